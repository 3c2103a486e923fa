"""Errors of serving experts on a device."""

from common.errors import WdmoeError
from wire.errors import ProbeError


class MemoryBudgetError(WdmoeError):
    """The experts do not fit into the device's memory.

    Attributes:
        needed_bytes: RAM that the chosen experts would take once loaded.
        available_bytes: RAM that they may take.
    """

    exit_code = 20

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class ProviderError(ProbeError):
    """A GPU can't compute an expert, or computes something else than where it was exported."""


class DuplicateNodeError(WdmoeError):
    """Another live node uses this id."""

    exit_code = 22


class TuningError(WdmoeError):
    """No bundle suits this device, or a tuning file is not one."""

    exit_code = 23
