"""One forward step of the distributed model: trunk here, experts wherever they are."""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bs_coordinator.feeds import Feed, Piece, cut_feeds
from bs_coordinator.forecast import LayerForecast
from bs_coordinator.records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.selection import Policy
from bs_coordinator.selection.degraded import select_available
from bs_coordinator.trunk import Trunk
from bs_coordinator.trunk_rows import MAX_ROWS, Rows
from wire.errors import ExpertsLostError, PlacementError
from wire.tensors import Array

if TYPE_CHECKING:
    from bs_coordinator.trunk_graphs import GraphedDecoder

log = logging.getLogger(__name__)


class ExpertOutput(NamedTuple):
    """What the experts of one layer made of some tokens.

    Attributes:
        output: float32 [tokens, hidden], Σ over experts of gate weight × expert output.
        dispatches: one record per request to a node.
    """

    output: Array
    dispatches: tuple[DispatchRecord, ...] = ()


class Pending(Protocol):
    """Experts that were asked."""

    def result(self) -> ExpertOutput:
        """Wait for them; once.

        Raises:
            WdmoeError: an expert could not be had.
        """

    def cancel(self) -> None:
        """Nobody will wait for them."""


class Ready(NamedTuple):
    """Experts that have answered already (`Pending`)."""

    output: ExpertOutput

    def result(self) -> ExpertOutput:
        return self.output

    def cancel(self) -> None:
        pass


_LOST = (ExpertsLostError, PlacementError)
"""Holders that fail, and those that have left since the forecast by which they were chosen."""


class Experts(Protocol):
    """All experts of a model, wherever they run."""

    def begin(self, layer: int, hidden: Array, gate: Array) -> Pending:
        """Have the chosen experts of a layer combined. Others may be asked before these have answered.

        Args:
            hidden: float32 [tokens, hidden].
            gate: float32 [tokens, experts], zero where an expert is not chosen.

        Raises:
            WdmoeError: an expert can't be had.
        """

    def forecast(self, layer: int) -> LayerForecast:
        """What asking for this layer's experts is predicted to cost now."""


class DistributedMixtral:
    """A Mixtral whose experts are elsewhere.

    Attributes:
        policy: how experts are chosen; may be replaced between steps.
        degrade: go on with the next best experts where some are lost, instead of giving up; tokens that this
            changes are named in the step's record.
        piece_tokens: longer feeds go through the layers in pieces of at most so many tokens, one behind the other, so
            that trunk and nodes work at the same time.
    """

    piece_tokens = 128

    def __init__(self, trunk: Trunk, experts: Experts, policy: Policy, *, degrade: bool = False) -> None:
        self.trunk = trunk
        self._experts = experts
        self.policy = policy
        self.degrade = degrade

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed], *, all_logits: bool = False) -> tuple[list[Tensor], StepRecord]:
        """Run several sequences one step on, with one round of expert requests per layer for all of them; several
        rounds where they are long (`piece_tokens`).

        Returns:
            Per feed logits in fp32 on the CPU, [1, vocab] of its last token, [tokens, vocab] with `all_logits`, or
            [rows, vocab] of the rows that it names; and what the step cost. On an error the caches are cut back to
            what they held.
        """
        past = [feed.cache.get_seq_length() for feed in feeds]
        try:
            return self._step(feeds, past[0], all_logits)
        except BaseException:
            # Layers before the failure have already appended their keys and values.
            for feed, length in zip(feeds, past, strict=True):
                self.trunk.truncate(feed.cache, length)
            raise

    def _step(self, feeds: Sequence[Feed], position: int, all_logits: bool) -> tuple[list[Tensor], StepRecord]:
        began_ns = time.perf_counter_ns()
        head_ns = 0
        waves = [_Wave(pieces) for pieces in cut_feeds(feeds, most_tokens=self.piece_tokens, all_logits=all_logits)]
        tallies = [_LayerTally() for _ in range(self.trunk.layers)]
        try:
            for layer in range(self.trunk.layers):
                # While nodes compute for one wave, the next goes through the trunk. It may attend to this one, whose
                # keys and values of this layer are there by now.
                for wave in waves:
                    if layer == 0:
                        mark_ns = time.perf_counter_ns()
                        wave.passage = self._passage([piece.feed for piece in wave.pieces])
                        head_ns += time.perf_counter_ns() - mark_ns
                    else:
                        self._finish(layer - 1, wave, tallies[layer - 1])
                    self._begin(layer, wave, tallies[layer])
            for wave in waves:
                self._finish(self.trunk.layers - 1, wave, tallies[-1])
        except BaseException:
            for wave in waves:
                wave.abandon()
            raise
        mark_ns = time.perf_counter_ns()
        # A GPU is still busy with the head.
        layers = tuple(tally.record(layer) for layer, tally in enumerate(tallies))
        logits: list[list[Tensor]] = [[] for _ in feeds]
        for wave in waves:
            for piece, some in zip(wave.pieces, wave.passage.logits(all_logits), strict=True):
                logits[piece.number].append(some)
        end_ns = time.perf_counter_ns()
        tokens = sum(len(feed.ids) for feed in feeds)
        record = StepRecord(
            phase="decode" if all(len(feed.ids) == 1 or feed.rows for feed in feeds) else "prefill",
            position=position,
            tokens=tokens,
            total_ns=end_ns - began_ns,
            head_ns=head_ns + end_ns - mark_ns,
            layers=layers,
        )
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in logits], record

    def _begin(self, layer: int, wave: "_Wave", tally: "_LayerTally") -> None:
        """A wave through a layer's trunk, and its experts asked."""
        began_ns = time.perf_counter_ns()
        wave.x, wave.probabilities = wave.passage.attend(layer)
        wave.choice = self._choose(wave.probabilities, wave.forecast or self._experts.forecast(layer))
        attended_ns = time.perf_counter_ns()
        try:
            wave.pending = self._experts.begin(layer, wave.x, wave.choice.gate)
        except _LOST as lost:
            wave.pending = Ready(self._ask_others(layer, wave, lost))
        # Nodes compute by now: what is for the next layer costs nothing here.
        wave.forecast = self._experts.forecast(layer + 1) if layer + 1 < self.trunk.layers else None
        tally.trunk_ns += attended_ns - began_ns
        tally.dispatch_ns += time.perf_counter_ns() - attended_ns

    def _finish(self, layer: int, wave: "_Wave", tally: "_LayerTally") -> None:
        """What a wave's experts made of it."""
        began_ns = time.perf_counter_ns()
        assert wave.pending is not None  # noqa: S101 - it was begun
        try:
            combined = wave.pending.result()
        except _LOST as lost:
            combined = self._ask_others(layer, wave, lost)
        wave.pending = None
        wave.passage.add(combined.output)
        tally.dispatch_ns += time.perf_counter_ns() - began_ns
        tally.asked.append((wave.choice.gate, wave.choice.forecast))
        tally.dispatches += combined.dispatches
        if wave.choice.degraded:
            tally.degraded += wave.tokens_of_step(wave.choice.degraded)

    def _passage(self, feeds: Sequence[Feed]) -> "_Passage":
        """Neighbours with few tokens together, where this trunk runs them so; in the order of the feeds."""
        if len(feeds) == 1 and feeds[0].packing is None and (graphs := self.trunk.graphs(feeds[0].ids, feeds[0].cache)):
            return _TokenPassage(graphs, feeds[0])
        passages: list[_Passage] = []
        for few, group in itertools.groupby(feeds, lambda f: len(f.ids) <= MAX_ROWS and f.packing is None):
            some = list(group)
            rows = self.trunk.rows([f.ids for f in some], [f.cache for f in some]) if few else None
            passages.append(_RowsPassage(rows, some) if rows else _BlocksPassage(self.trunk, some))
        return passages[0] if len(passages) == 1 else _JointPassage(passages)

    def _choose(self, probabilities: Array, forecast: LayerForecast) -> "_Choice":
        if not self.degrade:
            return _Choice(self.policy.select(probabilities, forecast), forecast, ())
        gate, degraded = select_available(self.policy, probabilities, forecast)
        return _Choice(gate, forecast, tuple(degraded.tolist()))

    def _ask_others(self, layer: int, wave: "_Wave", lost: Exception) -> ExpertOutput:
        """Where some experts are lost: choose again among those that are left, if that is allowed."""
        if not self.degrade:
            raise lost
        log.warning("%s; going on without", lost)
        # Each turn loses at least one node, and a layer has no more of them than experts.
        for turn in itertools.count(1):
            wave.choice = self._choose(wave.probabilities, self._experts.forecast(layer))
            try:
                return self._experts.begin(layer, wave.x, wave.choice.gate).result()
            except _LOST:
                if turn >= wave.probabilities.shape[1]:
                    raise
        raise AssertionError("counted to the end")


class _Wave:
    """Tokens that go through the layers together, and where they are.

    Attributes:
        pieces: of the step's feeds.
        x, probabilities, choice: what its experts were last asked, and why.
        pending: those that have not answered.
        forecast: of the next layer, if it was made already.
    """

    passage: "_Passage"
    x: Array
    probabilities: Array
    choice: "_Choice"

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.pending: Pending | None = None
        self.forecast: LayerForecast | None = None

    def abandon(self) -> None:
        """Give up half-way, wherever it is."""
        if self.pending is not None:
            self.pending.cancel()
        if hasattr(self, "passage"):
            self.passage.abandon()

    def tokens_of_step(self, rows: Sequence[int]) -> Iterator[int]:
        """Where some of its rows are among all tokens of the step."""
        tokens = [piece.first_token + i for piece in self.pieces for i in range(len(piece.feed.ids))]
        return (tokens[row] for row in rows)


class _LayerTally:
    """A layer's record while its waves pass."""

    def __init__(self) -> None:
        self.trunk_ns = self.dispatch_ns = 0
        self.asked: list[tuple[Array, LayerForecast]] = []
        self.dispatches: list[DispatchRecord] = []
        self.degraded: list[int] = []

    def record(self, layer: int) -> LayerRecord:
        return LayerRecord(
            layer=layer,
            trunk_ns=self.trunk_ns,
            dispatch_ns=self.dispatch_ns,
            asked=tuple(self.asked),
            dispatches=tuple(self.dispatches),
            degraded=tuple(self.degraded),
        )


class _Passage(Protocol):
    """Some sequences' new tokens on their way through the trunk."""

    def attend(self, layer: int) -> tuple[Array, Array]:
        """The experts' input [tokens, hidden] and the gate's probabilities [tokens, experts], fp32 on the host."""

    def add(self, output: Array) -> None:
        """What the experts made of it, float32 [tokens, hidden]."""

    def logits(self, all_logits: bool) -> list[Tensor]:
        """Per feed, as `DistributedMixtral.step` returns them."""

    def abandon(self) -> None:
        """Give up half-way."""
        return


class _RowsPassage(_Passage):
    """Sequences with few new tokens each, on their way through the trunk together."""

    def __init__(self, rows: Rows, feeds: Sequence[Feed]) -> None:
        self._rows = rows
        self._feeds = feeds

    def attend(self, layer: int) -> tuple[Array, Array]:
        x, probabilities = self._rows.attend(layer)
        return x.numpy(), probabilities.numpy()

    def add(self, output: Array) -> None:
        self._rows.add(torch.from_numpy(output))

    def logits(self, all_logits: bool) -> list[Tensor]:
        wanted, start = [], 0
        for feed in self._feeds:
            count = len(feed.ids)
            local = range(count) if all_logits else (row % count for row in feed.wanted)
            wanted.append([start + row for row in local])
            start += count
        logits = self._rows.head([row for rows in wanted for row in rows])
        return list(torch.split(logits, [len(rows) for rows in wanted]))


class _TokenPassage(_Passage):
    """One token of one sequence on its way through captured graphs."""

    def __init__(self, graphs: "GraphedDecoder", feed: Feed) -> None:
        self._graphs = graphs
        self._layer = 0
        graphs.begin(feed.ids[0], feed.cache)

    def attend(self, layer: int) -> tuple[Array, Array]:
        self._layer = layer
        return self._graphs.attend(layer)

    def add(self, output: Array) -> None:
        self._graphs.add(self._layer, output)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [self._graphs.head()]

    def abandon(self) -> None:
        self._graphs.abandon()


class _BlocksPassage(_Passage):
    """Sequences on their way through transformers' own blocks, one by one."""

    def __init__(self, trunk: Trunk, feeds: Sequence[Feed]) -> None:
        self._trunk = trunk
        self._feeds = feeds
        begun = [trunk.embed(torch.tensor(feed.ids), feed.cache, feed.packing) for feed in feeds]
        self._hidden, self._contexts = [h for h, _ in begun], [c for _, c in begun]

    def attend(self, layer: int) -> tuple[Array, Array]:
        attended = [self._trunk.attend(layer, h, c) for h, c in zip(self._hidden, self._contexts, strict=True)]
        self._hidden = [residual for residual, _, _ in attended]
        # The copies to the host also wait for a GPU, so that the clock after them is honest.
        return _to_host([x for _, x, _ in attended]), _to_host([p for _, _, p in attended])

    def add(self, output: Array) -> None:
        moved = torch.from_numpy(output).to(self._trunk.device, self._trunk.dtype)
        parts = torch.split(moved, [len(feed.ids) for feed in self._feeds])
        self._hidden = [residual + part[None] for residual, part in zip(self._hidden, parts, strict=True)]

    def logits(self, all_logits: bool) -> list[Tensor]:
        # One product for all sequences: the head's weights are the largest in the trunk and are read once.
        wanted = [h if all_logits else h[:, f.wanted] for h, f in zip(self._hidden, self._feeds, strict=True)]
        counts = [h.shape[1] for h in wanted]
        if not sum(counts):
            return [torch.empty(0, self._trunk.config.vocab_size)] * len(counts)
        return list(torch.split(self._trunk.head(torch.cat(wanted, dim=1)).cpu(), counts))


class _JointPassage(_Passage):
    """Several passages, whose experts are asked together."""

    def __init__(self, passages: Sequence[_Passage]) -> None:
        self._passages = passages
        self._ends: list[int] = []

    def attend(self, layer: int) -> tuple[Array, Array]:
        attended = [passage.attend(layer) for passage in self._passages]
        self._ends = list(itertools.accumulate(len(x) for x, _ in attended))
        return np.concatenate([x for x, _ in attended]), np.concatenate([p for _, p in attended])

    def add(self, output: Array) -> None:
        for passage, part in zip(self._passages, np.split(output, self._ends[:-1]), strict=True):
            passage.add(part)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [logits for passage in self._passages for logits in passage.logits(all_logits)]


class _Choice(NamedTuple):
    """Gate weights float32 [tokens, experts], what they were chosen by, and which tokens lost experts."""

    gate: Array
    forecast: LayerForecast
    degraded: tuple[int, ...]


def _to_host(tensors: list[Tensor]) -> Array:
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    array: Array = joined.float().cpu().numpy()
    return array
