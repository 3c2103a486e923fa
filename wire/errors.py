"""Errors of what base station and nodes share: bundles, the broker, frames."""

from common.errors import WdmoeError


class BundleError(WdmoeError):
    """A bundle is missing, incomplete, tampered with or of another schema version."""

    exit_code = 11


class SignatureError(BundleError):
    """A bundle is not signed, or not by the key that was given."""

    exit_code = 14


class ProbeError(WdmoeError):
    """An expert computes something else on this device than where it was exported."""

    exit_code = 21


class BrokerError(WdmoeError):
    """The broker can't be reached or was lost."""

    exit_code = 30


class BrokerAuthError(BrokerError):
    """The broker refused user or password."""

    exit_code = 31


class PlaintextError(BrokerError):
    """A broker beyond loopback without TLS, and nobody said that this is meant."""

    exit_code = 33


class FrameError(WdmoeError):
    """Bytes that are not a valid frame.

    Attributes:
        reason: one of a few fixed words, for counters (`length`, `magic`, `version`, `crc`, …).
    """

    exit_code = 50

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
