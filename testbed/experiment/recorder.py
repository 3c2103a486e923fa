"""Collects what a cell measures. On the hot path it only keeps references; rows are made after the measuring."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.telemetry_inbox import Arrived
from testbed.experiment.clocks import Moment, Probe, node_clocks, offset_rows, probe_rows
from testbed.experiment.tables import SCHEMAS, table
from testbed.experiment.telemetry import sensor_rows, telemetry_row

Row = tuple[object, ...]
Sampler = Callable[[], Sequence[Row]]


class _Token(NamedTuple):
    answer: int
    token: int
    warm_up: bool
    token_id: int | None
    steps: tuple[StepRecord, ...]
    ended_unix_ns: int
    ended_monotonic_ns: int
    log_ns: int


class Recorder:
    """One cell's rows.

    Attributes:
        log_ns: time that recording took so far, sampling included.
        tokens: recorded so far, the warm-up's included.
    """

    def __init__(
        self,
        *,
        top_k: int,
        sample_s: float,
        links: Sampler = lambda: (),
        telemetry: Callable[[], Sequence[Arrived]] = lambda: (),
        clocks: Callable[[], Sequence[ClockSample]] = lambda: (),
        together: bool = True,
    ) -> None:
        """Begin a cell.

        Args:
            top_k: experts per token and layer that a policy would ask for if it dropped none.
            sample_s: seconds between two samples of clocks and links.
            links: gives rows of `link_samples` without their two clock columns.
            telemetry: gives what nodes told of themselves since the last call; what came before the cell is left out.
            clocks: gives what nodes' clocks showed since the last call, and asks them again.
            together: the tokens of a step chose together; else no time of a layer was predicted.
        """
        self.log_ns = 0
        self._together = together
        self._top_k = top_k
        self._sample_ns = int(sample_s * 1e9)
        self._links = links
        self._telemetry = telemetry
        self._clocks = clocks
        self._arrived: list[Arrived] = []
        self._probes: list[Probe] = []
        self._ticks: list[tuple[int, int]] = []
        telemetry()
        self._tokens: list[_Token] = []
        self._rows: dict[str, list[Row]] = {name: [] for name in SCHEMAS}
        self._next_sample_ns = 0

    @property
    def tokens(self) -> int:
        """See the class."""
        return len(self._tokens)

    def token(
        self, answer: int, token: int, steps: tuple[StepRecord, ...], *, id: int | None = None, warm_up: bool = False
    ) -> None:
        """Keep one token, or one step of several sequences."""
        began_ns = time.perf_counter_ns()
        ended_ns = time.monotonic_ns()
        if ended_ns >= self._next_sample_ns:
            self._next_sample_ns = ended_ns + self._sample_ns
            self.sample()
        log_ns = time.perf_counter_ns() - began_ns
        self._tokens.append(_Token(answer, token, warm_up, id, steps, time.time_ns(), ended_ns, log_ns))
        self.log_ns += time.perf_counter_ns() - began_ns

    def sample(self) -> None:
        """Read clocks, links and what nodes told of themselves now."""
        now = time.time_ns(), time.monotonic_ns()
        self._ticks.append(now)
        self.take_clocks("during")
        self._rows["link_samples"] += [(*now, *row) for row in self._links()]
        self._arrived += self._telemetry()

    def take_clocks(self, moment: Moment) -> None:
        """Keep what nodes' clocks showed since the last call."""
        self._probes += [(moment, sample) for sample in self._clocks()]

    def add(self, name: str, row: Row) -> None:
        """Add one row to a table that is not made of steps."""
        self._rows[name].append(row)

    def tables(self) -> dict[str, pa.Table]:
        """All tables that have rows."""
        clocks = node_clocks(self._probes)
        made: dict[str, list[Row]] = {
            **self._rows,
            "clocks": list(offset_rows(self._ticks, clocks)),
            "clock_probes": list(probe_rows(self._probes, clocks)),
            "tokens": [self._token_row(t) for t in self._tokens],
            "layers": [row for t in self._tokens for row in _layer_rows(t, predicted=self._together)],
            "latency": [row for t in self._tokens for row in _latency_rows(t)],
            "telemetry": [telemetry_row(arrived) for arrived in self._arrived],
            "sensors": [row for arrived in self._arrived for row in sensor_rows(arrived)],
        }
        return {name: table(name, rows) for name, rows in made.items() if rows}

    def _token_row(self, t: _Token) -> Row:
        splits = [step.split_ns() for step in t.steps]
        layers = [layer for step in t.steps for layer in step.layers]
        dispatches = [d for layer in layers for d in layer.dispatches]
        draft_ns = sum(step.draft_ns for step in t.steps)
        total_ns = sum(step.total_ns for step in t.steps) + draft_ns
        step_tokens = sum(step.tokens for step in t.steps)
        return (
            *(t.answer, t.token, t.warm_up, t.token_id, t.steps[-1].phase if t.steps else "decode", step_tokens),
            *(t.ended_unix_ns - total_ns, t.ended_monotonic_ns - total_ns, total_ns),
            *(sum(s.trunk for s in splits), sum(s.network for s in splits), sum(s.compute for s in splits)),
            *(sum(s.wait for s in splits), sum(s.framing for s in splits)),
            sum(layer.pairs for layer in layers),
            sum(step.tokens * len(step.layers) for step in t.steps) * self._top_k,
            *(sum(d.down_bytes for d in dispatches), sum(d.up_bytes for d in dispatches)),
            *(sum(step.drafted for step in t.steps), sum(step.accepted for step in t.steps), draft_ns, t.log_ns),
        )


def _layer_rows(t: _Token, *, predicted: bool) -> Iterator[Row]:
    for number, step in enumerate(t.steps):
        for layer in step.layers:
            slowest = layer.critical.node if layer.critical else None
            costs = layer.trunk_ns, layer.dispatch_ns, layer.pairs
            predicted_ns = layer.predicted_ns if predicted else None
            yield t.answer, t.token, t.warm_up, number, layer.layer, *costs, slowest, predicted_ns


def _latency_rows(t: _Token) -> Iterator[Row]:
    for step in t.steps:
        for layer in step.layers:
            for d in layer.dispatches:
                yield (
                    *(t.answer, t.token, t.warm_up, step.phase, step.position, step.tokens),
                    *(layer.layer, layer.trunk_ns, layer.dispatch_ns),
                    *(d.node, " ".join(map(str, d.experts)), d.tokens, d.sent_unix_ns, d.round_trip_ns, d.network_ns),
                    *(d.durations.queue_ns, d.durations.decode_ns, d.durations.compute_ns, d.durations.encode_ns),
                    *(d.down_bytes, d.up_bytes, d.predicted_ns),
                )
