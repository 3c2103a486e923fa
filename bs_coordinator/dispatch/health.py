"""Which nodes are left out for a while, by how their requests end. Pure: times come with the events.

A heartbeat proves that a process is alive, not that it computes. So a node that fails a request is left out for a
pause, used again once it answers a ping, and left out for longer if it fails again.
"""

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 60.0
QUARANTINE_S = 600.0
"""Pause of a node that computes nonsense: it may be broken or hostile."""
PING_TIMEOUT_S = 2.0
_MOST_DOUBLINGS = 10
_FORGIVEN_S = 120.0
"""After this long without a failure, the next one counts as the first."""


@dataclass(slots=True)
class _Record:
    failures: int = 0
    out_until_s: float = 0.0
    back: bool = True
    why: str = ""


class Health:
    """Failures and recoveries of all nodes. Times are in seconds by any one clock.

    Attributes:
        changes: grows whenever a node is left out or used again.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._records: dict[str, _Record] = {}

    def failed(self, node: str, now_s: float, why: str, *, least_pause_s: float = 0.0) -> None:
        """A request to `node` failed: leave it out, twice as long as last time, and for at least `least_pause_s`."""
        record = self._records.setdefault(node, _Record())
        if not record.back and now_s < record.out_until_s:
            return  # another request of the same layer failed with it
        if now_s - record.out_until_s > _FORGIVEN_S:
            record.failures = 0
        pause_s = max(least_pause_s, min(MOST_PAUSE_S, FIRST_PAUSE_S * 2**record.failures))
        record.failures = min(record.failures + 1, _MOST_DOUBLINGS)
        record.out_until_s, record.back, record.why = now_s + pause_s, False, why
        self.changes += 1
        log.warning("node '%s' is left out for %.0f s: %s", node, pause_s, why)

    def proven(self, node: str) -> None:
        """Use `node` again: it answered a ping that was sent after its pause."""
        record = self._records.get(node)
        if record and not record.back:
            record.back = True
            self.changes += 1
            log.warning("node '%s' answers again and is used again", node)

    def forget(self, node: str) -> None:
        """Clear the record of `node`: a new process runs under this name."""
        if self._records.pop(node, None):
            self.changes += 1

    def usable(self, node: str) -> bool:
        """Whether `node` may be sent work."""
        record = self._records.get(node)
        return record is None or record.back

    def why(self, node: str) -> str:
        """Why `node` is left out; empty if it is not."""
        record = self._records.get(node)
        return record.why if record and not record.back else ""

    def to_prove(self, now_s: float) -> list[str]:
        """The nodes to ping now that their pause is over; each is due again `PING_TIMEOUT_S` later."""
        due = [n for n, r in self._records.items() if not r.back and now_s >= r.out_until_s]
        for node in due:
            self._records[node].out_until_s = now_s + PING_TIMEOUT_S
        return due
