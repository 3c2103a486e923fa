"""Reading the events of a run: each kind of event has the fields that reports and the status need. Pure."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from common.jsonl import decode_json, strict_json

Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class _Event(Struct, kw_only=True):
    event: str
    unix_ns: Nanoseconds


class _OfCell(_Event):
    cell: str


class _CellStarted(_OfCell):
    what: str


class _CellFailed(_OfCell):
    error: str
    kind: str
    attempt: Count


class _RunResumed(_Event):
    gap_s: float
    after: str
    lost: Count


class _AlertOver(_Event):
    kind: str
    subject: str


class _Alert(_AlertOver):
    detail: str


class _Note(_Event):
    text: str
    photo: str | None = None


_KINDS: dict[str, type[_Event]] = {
    "cell_started": _CellStarted,
    "cell_failed": _CellFailed,
    "no_measured_costs": _OfCell,
    "run_resumed": _RunResumed,
    "alert": _Alert,
    "alert_over": _AlertOver,
    "note": _Note,
}
"""Events with fields that are read again; those of other kinds are for people."""


def decode_event(line: bytes) -> dict[str, Any]:
    """The event in one line of `events.jsonl`, with all of its fields.

    Raises:
        ValueError: not an event, or a field that is needed is missing or of another type.
    """
    document: dict[str, Any] = strict_json(line)
    decode_json(line, _KINDS.get(decode_json(line, _Event).event, _Event))
    return document
