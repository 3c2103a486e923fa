"""Collects what a cell measures. During the measurement it only keeps references; rows are made afterwards."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.links import Probing
from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from testbed.experiment.clock_rows import Probe, clock_rows, node_clocks, probe_rows
from testbed.run_directory.columns import Table
from testbed.run_directory.machine_tables import (
    CLOCK_PROBES,
    CLOCKS,
    LINK_SAMPLES,
    SENSORS,
    TELEMETRY,
    LinkSample,
    Moment,
    sensor_rows,
)
from testbed.run_directory.step_tables import LATENCY, LAYERS, TOKENS, TokenRecord

Item = TypeVar("Item")


class LinkValue(NamedTuple):
    """One quantity of a node's link now; `kind` is `TRUTH`, `ESTIMATE`, `FORECAST` or `COUNT`."""

    node: str
    kind: str
    quantity: str
    value: float


class Recorder:
    """The rows of one cell.

    Attributes:
        log_ns: time that recording took so far, sampling included.
    """

    def __init__(
        self,
        *,
        top_k: int,
        sample_s: float,
        links: Callable[[], Sequence[LinkValue]] = lambda: (),
        telemetry: Callable[[], Sequence[ReceivedTelemetry]] = lambda: (),
        clocks: Callable[[], Sequence[ClockSample]] = lambda: (),
        probing: Callable[[], Probing] = Probing,
        together: bool = True,
    ) -> None:
        """Begin a cell; telemetry that arrived before is dropped.

        Args:
            top_k: experts per token and layer that plain top-k asks for.
            sample_s: seconds between two samples of clocks and links.
            links: returns the state of all links now.
            telemetry: returns the nodes' telemetry since the last call.
            clocks: returns the answers of clock probes since the last call, and probes the clocks again.
            probing: returns what probes of all links took so far.
            together: whether the tokens of a step choose their experts together; else no layer's time was predicted.
        """
        self.log_ns = 0
        self._together = together
        self._top_k = top_k
        self._sample_ns = int(sample_s * 1e9)
        self._links = links
        self._telemetry = telemetry
        self._clocks = clocks
        self._probing = probing
        self._probed = probing()
        self._arrived: list[ReceivedTelemetry] = []
        self._probes: list[Probe] = []
        self._ticks: list[tuple[int, int]] = []
        self._link_samples: list[LinkSample] = []
        self._tokens: list[TokenRecord] = []
        self._results: dict[str, tuple[Table[Any], list[Any]]] = {}
        self._next_sample_ns = 0
        telemetry()

    @property
    def tokens(self) -> int:
        """Number of tokens recorded so far, including those of the warm-up."""
        return len(self._tokens)

    def token(
        self, answer: int, token: int, steps: tuple[StepRecord, ...], *, id: int | None = None, warm_up: bool = False
    ) -> None:
        """Record one token, or one step of a batch."""
        began_ns = time.perf_counter_ns()
        ended_ns = time.monotonic_ns()
        if ended_ns >= self._next_sample_ns:
            self._next_sample_ns = ended_ns + self._sample_ns
            self.sample()
        before, self._probed = self._probed, self._probing()
        self._tokens.append(
            TokenRecord(
                answer=answer,
                token=token,
                warm_up=warm_up,
                token_id=id,
                steps=steps,
                ended_unix_ns=time.time_ns(),
                ended_monotonic_ns=ended_ns,
                log_ns=time.perf_counter_ns() - began_ns,
                top_k=self._top_k,
                predicted=self._together,
                probe_down_bytes=self._probed.down_bytes - before.down_bytes,
                probe_up_bytes=self._probed.up_bytes - before.up_bytes,
            )
        )
        self.log_ns += time.perf_counter_ns() - began_ns

    def sample(self) -> None:
        """Sample clocks, links and telemetry now."""
        now = time.time_ns(), time.monotonic_ns()
        self._ticks.append(now)
        self.take_clocks("during")
        self._link_samples += [
            LinkSample(*now, link.node, link.kind, link.quantity, link.value) for link in self._links()
        ]
        self._arrived += self._telemetry()

    def take_clocks(self, moment: Moment) -> None:
        """Record the answers of clock probes since the last call."""
        self._probes += [(moment, sample) for sample in self._clocks()]

    def add(self, table: Table[Item], item: Item) -> None:
        """Add one row to a table of results."""
        self._results.setdefault(table.name, (table, []))[1].append(item)

    def tables(self) -> dict[str, pa.Table]:
        """All tables that have rows, by name."""
        clocks = node_clocks(self._probes)
        rows: list[tuple[Table[Any], Sequence[Any]]] = [
            (TOKENS, self._tokens),
            (LAYERS, [row for token in self._tokens for row in token.layer_rows()]),
            (LATENCY, [row for token in self._tokens for row in token.request_rows()]),
            *self._results.values(),
            (CLOCKS, [*clock_rows(self._ticks, clocks)]),
            (CLOCK_PROBES, [*probe_rows(self._probes, clocks)]),
            (TELEMETRY, self._arrived),
            (SENSORS, [row for arrived in self._arrived for row in sensor_rows(arrived)]),
            (LINK_SAMPLES, self._link_samples),
        ]
        return {table.name: table.build(items) for table, items in rows if items}
