"""Errors of the base station."""

from common.errors import WdmoeError
from wire.errors import BrokerError


class BrokerDelayError(BrokerError):
    """Round trips through the broker show the signature of a missing TCP_NODELAY."""

    exit_code = 32


class PlacementError(WdmoeError):
    """No node holds an expert that the model needs."""

    exit_code = 40


class FleetTooSmallError(WdmoeError):
    """The devices of a plan can't hold the model; the message says what is missing."""

    exit_code = 49


class DispatchError(WdmoeError):
    """A node failed or did not answer before the deadline."""

    exit_code = 41


class ExpertsLostError(DispatchError):
    """All holders of an expert failed or are left out for now."""


class ContextLengthError(WdmoeError):
    """The prompt is longer than the model's context."""

    exit_code = 42


class ShapingError(WdmoeError):
    """The down-link can't be shaped as asked."""

    exit_code = 43


class BusyError(WdmoeError):
    """As many requests as are allowed are being answered.

    Attributes:
        retry_after_s: when it should be worth another try.
    """

    exit_code = 44

    def __init__(self, requests: int, *, retry_after_s: float) -> None:
        super().__init__(f"busy with {requests} requests: retry after {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class ServeError(WdmoeError):
    """The HTTP interface can't be opened as asked."""

    exit_code = 45


class TrunkError(WdmoeError):
    """The trunk can't run on the device that was asked for, or its GPU failed."""

    exit_code = 46


class ChatTemplateError(WdmoeError):
    """The model's chat template refuses a conversation, or fails for it."""

    exit_code = 48


class AnswerError(WdmoeError):
    """A library failed while it worked on one answer, or the model's output for it is not finite."""

    exit_code = 47
