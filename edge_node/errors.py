"""Errors of serving experts on a device."""

from common.errors import WdmoeError


class MemoryBudgetError(WdmoeError):
    """The experts do not fit.

    Attributes:
        needed_bytes: what the chosen experts would take once loaded.
        available_bytes: what may be used.
    """

    exit_code = 20

    def __init__(self, message: str, *, needed_bytes: int, available_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes


class DuplicateNodeError(WdmoeError):
    """Another live node uses this id."""

    exit_code = 22


class TuningError(WdmoeError):
    """No bundle suits this device, or a tuning file is none."""

    exit_code = 23
