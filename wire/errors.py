"""Errors of what base station and nodes share: bundles, the broker, frames."""

from common.errors import WdmoeError


class BundleError(WdmoeError):
    """A bundle is missing, incomplete, changed or of another schema version."""

    exit_code = 11


class SignatureError(BundleError):
    """A bundle is not signed, or not with the given key."""

    exit_code = 14


class ProbeError(WdmoeError):
    """An expert computes something else on this device than where it was exported."""

    exit_code = 21


class BrokerError(WdmoeError):
    """The broker can't be reached, or the connection was lost."""

    exit_code = 30


class BrokerAuthError(BrokerError):
    """The broker refused user, password or certificate, or its own certificate is not accepted.

    Attributes:
        final: trying again can't help before somebody changes something. False if time alone may help: a certificate
            that is not valid yet by this machine's clock.
    """

    exit_code = 31

    def __init__(self, message: str, *, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


class PlaintextError(BrokerError):
    """An unencrypted connection to another machine, without `--allow-plaintext`."""

    exit_code = 33


class FrameError(WdmoeError):
    """Bytes that are not a valid frame.

    Attributes:
        reason: one of a few fixed words, for counters: `length`, `magic`, `version`, `crc` and others.
    """

    exit_code = 50

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ResultContentError(FrameError):
    """A result frame whose header, tag and checksum are right, but not its content: its sender computes nonsense.

    Attributes:
        id: session, request and attempt of the request that it answers (`wire.frames.RequestId`).
    """

    def __init__(self, reason: str, message: str, id: tuple[int, int, int]) -> None:
        super().__init__(reason, message)
        self.id = id
