"""What a whole-shape run measures, and its results. Pure, except for the file of results."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from bs_coordinator.placement.boards import BoardLink
from bs_coordinator.placement.known_fleet import predict_known
from bs_coordinator.placement.predict import Routing
from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.selection.forecast import Index
from common.jsonl import read_json_lines
from testbed.bench.fleet_parts import FleetParts
from testbed.network.uniform import Links
from testbed.node_shares import selectors_of
from wire.manifest import Manifest

BATCHES = (1, 4, 8)
LINKS = ((100.0, 2.0), (100.0, 5.0), (50.0, 2.0), (50.0, 5.0))
"""Mbit/s per direction, and ms of a round trip."""
PROFILES = tuple(Links(rtt_ms, mbps, shared) for shared, (mbps, rtt_ms) in itertools.product((False, True), LINKS))
"""Of the emulated network: dedicated links, and one shared channel."""
ACCEPTANCE: tuple[tuple[int, int], ...] = ((5, 3), (4, 2), (5, 2), (4, 2), (5, 3))
"""Draft tokens of a step, and how many of them count as right. On average as many, 4.6 and 2.4, as in 51 answers
of the demo model on eight nodes at 5 ms with 16 cores (docs/performance.md): a draft model of
random weights is never right."""


class Arm(Struct, frozen=True):
    """One combination of what is varied.

    Attributes:
        model: name of the twin.
        layers: of it.
        nodes: with a core each.
        slices: into which each expert is cut.
        mbps: rate of every link, in each direction.
        rtt_ms: round trip of every link.
        shared_air: whether all links share one channel.
        sequences: that decode together.
        drafts: steps check draft tokens of one sequence, as many as `ACCEPTANCE` says.
    """

    model: str
    layers: int
    nodes: int
    slices: int
    mbps: float
    rtt_ms: float
    shared_air: bool
    sequences: int
    drafts: bool

    @property
    def profile(self) -> str:
        """Name of the link profile."""
        return Links(self.rtt_ms, self.mbps, self.shared_air).profile

    def __str__(self) -> str:
        mode = "drafts" if self.drafts else f"{self.sequences} at once"
        return f"{self.model}, {self.layers} layers, {self.nodes} nodes, {self.slices} slices, {self.profile}, {mode}"


class StepRow(Struct, frozen=True):
    """One step, in ms.

    Attributes:
        rows: hidden states that went through the model.
        tokens: tokens that it gave to all sequences together.
        total_ms: of the whole step; the others are its parts (`bs_coordinator.engine.step_records.TimeSplit`).
        requests: to nodes, over all layers.
    """

    rows: int
    tokens: int
    total_ms: float
    trunk_ms: float
    network_ms: float
    compute_ms: float
    wait_ms: float
    framing_ms: float
    requests: int


class Alone(Struct, frozen=True):
    """Parts of a step, each measured alone on this machine.

    Attributes:
        trunk_ms: trunk and head, by the number of sequences with a row each.
        draft_trunk_ms: the same, by the rows of a single sequence.
        fleet: parts of layers, measured on the idle fleet.
    """

    trunk_ms: RowCurve
    draft_trunk_ms: RowCurve
    fleet: FleetParts


def even_routing(manifest: Manifest, recorded: Mapping[int, Index]) -> Routing:
    """The routing of random weights: all experts alike, with the steps that were recorded."""
    dims = manifest.dims
    return Routing(np.ones((dims.layers, dims.experts), np.float32), dims.top_k, recorded=recorded)


class ArmResult(Struct, frozen=True):
    """A finished arm: a line of `samples.jsonl`.

    Attributes:
        steps: all measured steps.
        predicted_ms: per token, by the planner from the parts alone, the links' configured rates and their idle round
            trips.
        alone: these parts.
        idle_ms: round trips of idle links, by node.
        unix_s: when it was finished.
    """

    arm: Arm
    steps: tuple[StepRow, ...]
    predicted_ms: float
    alone: Alone
    idle_ms: dict[str, float]
    unix_s: int

    @property
    def token_ms(self) -> float:
        """Measured time per token: the median over steps, or with drafts all steps' time over all their tokens."""
        if self.arm.drafts:
            return sum(step.total_ms for step in self.steps) / sum(step.tokens for step in self.steps)
        return statistics.median(step.total_ms / step.tokens for step in self.steps)

    def part_ms(self, part: str) -> float:
        """Median over steps of a part of them, such as `network`; per step, not per token."""
        return float(statistics.median(getattr(step, f"{part}_ms") for step in self.steps))


def arms_of(model: str, layers: int, nodes: int, slices: int) -> list[Arm]:
    """All arms of a model cut into so many slices, the most wanted first."""
    modes = [*((count, False) for count in BATCHES), (1, True)]
    return [
        Arm(model, layers, nodes, slices, mbps, rtt_ms, shared, count, drafts)
        for shared, (mbps, rtt_ms), (count, drafts) in itertools.product((False, True), LINKS, modes)
    ]


def read_results(path: Path) -> dict[Arm, ArmResult]:
    """The finished arms in a file, which need not exist."""
    if not path.exists():
        return {}
    decode = msgspec.json.Decoder(ArmResult).decode
    return {result.arm: result for result in read_json_lines(path, decode)}


def predicted_ms(arm: Arm, manifest: Manifest, alone: Alone, idle_ms: Mapping[str, float], routing: Routing) -> float:
    """The planner's prediction per token, from the configured rates and the parts measured alone.

    Args:
        idle_ms: round trips of idle links, by node.
        routing: which experts steps ask.
    """
    fleet = alone.fleet
    experts = selectors_of(manifest.dims, arm.nodes)
    links = {node: BoardLink(idle_ms[node] / 1e3, arm.mbps, arm.mbps) for node in experts}
    trunk_ms = alone.draft_trunk_ms if arm.drafts else alone.trunk_ms

    def step_ms(rows: int) -> float:
        step = predict_known(
            manifest, experts, links, unit_s=fleet.unit_ms.scaled(1e-3), crowd=fleet.crowd, node_s=0.0,
            station=fleet.station(trunk_ms.scaled(1e-3)), routing=routing, shared_air=arm.shared_air, rows=rows,
        )  # fmt: skip
        return 1e3 * step.seconds

    if arm.drafts:
        by_rows = {drafted: step_ms(1 + drafted) for drafted in {drafted for drafted, _ in ACCEPTANCE}}
        return sum(by_rows[drafted] for drafted, _ in ACCEPTANCE) / sum(1 + right for _, right in ACCEPTANCE)
    return step_ms(arm.sequences) / arm.sequences


def table(results: Sequence[ArmResult]) -> Iterator[str]:
    """Lines of Markdown: all results, and slices compared with whole experts."""
    whole = {_without_slices(r.arm): r.token_ms for r in results if r.arm.slices == 1}
    yield "| model, layers, nodes | slices | links | mode | ms per token | tokens/s | predicted ms | ÷ that | × whole |"
    yield "|---|---:|---|---|---:|---:|---:|---:|---:|"
    for result in results:
        arm = result.arm
        mode = "drafts" if arm.drafts else f"batch {arm.sequences}"
        base = whole.get(_without_slices(arm))
        yield (
            f"| {arm.model}, {arm.layers}, {arm.nodes} | {arm.slices} | {arm.profile} | {mode} | {result.token_ms:.1f} "
            f"| {1e3 / result.token_ms:.2f} | {result.predicted_ms:.1f} | {result.token_ms / result.predicted_ms:.2f} "
            f"| {f'{base / result.token_ms:.2f}' if base else ''} |"
        )
    yield ""
    yield "Where the time of a step goes, ms, medians:"
    yield ""
    parts = ("trunk", "network", "compute", "wait", "framing", "total")
    yield f"| model, slices, links, mode | {' | '.join(parts)} | requests per layer |"
    yield f"|---{'|---:' * (len(parts) + 1)}|"
    for result in results:
        arm = result.arm
        mode = "drafts" if arm.drafts else f"batch {arm.sequences}"
        requests = statistics.mean(step.requests for step in result.steps) / arm.layers
        times = " | ".join(f"{result.part_ms(part):.1f}" for part in parts)
        yield f"| {arm.model}, {arm.slices}, {arm.profile}, {mode} | {times} | {requests:.1f} |"


def _without_slices(arm: Arm) -> Arm:
    return msgspec.structs.replace(arm, slices=1)
