"""The latency log: one CSV row per step, layer and node, appended while the run goes on.

`docs/measurement.md` is its data dictionary. Durations are the base station's (`*_ns` of `node_*` the node's
own), so that no clock has to agree with another.
"""

import csv
from pathlib import Path
from types import TracebackType
from typing import Self

from bs_coordinator.engine.sequence import TokenEvent

COLUMNS = (
    "answer",
    "token",
    "phase",
    "position",
    "step_tokens",
    "layer",
    "trunk_ns",
    "dispatch_ns",
    "node",
    "experts",
    "tokens",
    "sent_unix_ns",
    "round_trip_ns",
    "network_ns",
    "node_queue_ns",
    "node_decode_ns",
    "node_compute_ns",
    "node_encode_ns",
    "down_bytes",
    "up_bytes",
)


class LatencyLog:
    """An open latency log."""

    def __init__(self, path: Path) -> None:
        """Begin a new file; an existing one is not overwritten (FileExistsError)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, answer: int, token: int, event: TokenEvent) -> None:
        """Add the rows of one token and hand them to the operating system."""
        for step in event.steps:
            for layer in step.layers:
                for d in layer.dispatches:
                    self._writer.writerow(
                        (
                            *(answer, token, step.phase, step.position, step.tokens),
                            *(layer.layer, layer.trunk_ns, layer.dispatch_ns),
                            *(d.node, " ".join(map(str, d.experts)), d.tokens, d.sent_unix_ns),
                            *(d.round_trip_ns, d.network_ns),
                            *(d.durations.queue_ns, d.durations.decode_ns),
                            *(d.durations.compute_ns, d.durations.encode_ns),
                            *(d.down_bytes, d.up_bytes),
                        )
                    )
        self._file.flush()
