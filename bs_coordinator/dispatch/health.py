"""Which nodes are left out for a while, by how their requests end. Pure: times come with the events.

A heartbeat proves that a process is alive, not that it computes. So a node that fails a request is left out for a
pause, used again once it answers a ping, and left out for longer if it fails again.
"""

import logging
from collections import Counter
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
MOST_PAUSE_S = 60.0
QUARANTINE_S = 600.0
"""Pause of a node that computes nonsense: it may be broken or hostile."""
PING_TIMEOUT_S = 2.0
DOUBT_PING_S = 0.5
"""How often a node is pinged that is not to blame for its silence."""
_MOST_DOUBLINGS = 10
_FORGIVEN_S = 120.0
"""After this long without a failure, the next one counts as the first."""


@dataclass(slots=True)
class _Record:
    failures: int = 0
    pause_ends_s: float = 0.0
    next_ping_s: float = 0.0
    back: bool = True
    doubted: bool = False
    quarantined: bool = False
    why: str = ""


class Health:
    """Failures and recoveries of all nodes. Times are in seconds by any one clock.

    Attributes:
        changes: grows whenever a node is left out or used again.
        counts: how often each node was `failed`, `quarantined` or `doubted`, by the node's name and this word.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self._records: dict[str, _Record] = {}

    def failed(self, node: str, now_s: float, why: str, *, quarantine: bool = False) -> None:
        """A request to `node` failed: leave it out, twice as long as last time; with `quarantine`, for ten minutes."""
        record = self._records.setdefault(node, _Record())
        paused = not record.back and not record.doubted and now_s < record.next_ping_s
        if paused and (record.quarantined or not quarantine):
            return  # another request of the same layer failed with it
        if now_s - record.pause_ends_s > _FORGIVEN_S:
            record.failures = 0
        pause_s = QUARANTINE_S if quarantine else min(MOST_PAUSE_S, FIRST_PAUSE_S * 2**record.failures)
        record.failures = min(record.failures + 1, _MOST_DOUBLINGS)
        record.pause_ends_s = record.next_ping_s = now_s + pause_s
        record.back, record.doubted, record.quarantined, record.why = False, False, quarantine, why
        self.changes += 1
        self.counts[node, "quarantined" if quarantine else "failed"] += 1
        log.warning("node '%s' is left out for %.0f s: %s", node, pause_s, why)

    def doubt(self, node: str, now_s: float, why: str) -> None:
        """A request to `node` is overdue, and so may be everything else: prefer other nodes until it answers a ping.

        There is no pause, and it does not count as a failure.
        """
        record = self._records.setdefault(node, _Record())
        if not record.back:
            return
        record.pause_ends_s = record.next_ping_s = now_s
        record.back, record.doubted, record.why = False, True, why
        self.changes += 1
        self.counts[node, "doubted"] += 1
        log.warning("node '%s' is asked last until it answers a ping: %s; no other node was heard either", node, why)

    def proven(self, node: str, pinged_s: float) -> None:
        """Use `node` again if it answered a ping that was sent after its pause."""
        record = self._records.get(node)
        if record and not record.back and pinged_s >= record.pause_ends_s:
            record.back, record.doubted, record.quarantined = True, False, False
            self.changes += 1
            log.warning("node '%s' answers again and is used again", node)

    def acquitted(self, node: str) -> None:
        """`node` was not at fault: use it again at once."""
        if self._records.pop(node, None) is not None:
            self.changes += 1
            log.warning("node '%s' is used again: it was not at fault", node)

    def restarted(self, node: str) -> None:
        """A new process runs under this name: clear the record of `node`, except for a quarantine."""
        record = self._records.get(node)
        if record and not record.quarantined:
            del self._records[node]
            self.changes += 1

    def usable(self, node: str) -> bool:
        """Whether `node` may be sent work."""
        record = self._records.get(node)
        return record is None or record.back

    def doubted(self, node: str) -> bool:
        """Whether `node` is not usable only because nothing was heard from any node."""
        record = self._records.get(node)
        return record is not None and record.doubted

    def quarantined(self, node: str) -> bool:
        """Whether `node` is left out because it computed nonsense."""
        record = self._records.get(node)
        return record is not None and record.quarantined

    @property
    def all_usable(self) -> bool:
        """Whether no node is left out."""
        return all(record.back for record in self._records.values())

    def why(self, node: str) -> str:
        """Why `node` is left out; empty if it is not."""
        record = self._records.get(node)
        return record.why if record and not record.back else ""

    def to_prove(self, now_s: float) -> list[str]:
        """The nodes to ping now that their pause is over; each is due again some time later."""
        due = [n for n, r in self._records.items() if not r.back and now_s >= r.next_ping_s]
        for node in due:
            record = self._records[node]
            record.next_ping_s = now_s + (DOUBT_PING_S if record.doubted else PING_TIMEOUT_S)
        return due
