"""One forward step of the distributed model: trunk here, experts wherever they are."""

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bs_coordinator.engine.experts import ExpertOutput, Experts, Pending, Ready
from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.errors import ExpertsLostError, PlacementError
from bs_coordinator.selection import Policy
from bs_coordinator.selection.degraded import select_available
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import Piece, SequenceInput, cut_inputs
from bs_coordinator.trunk.passes import TrunkPass, start_pass
from bs_coordinator.trunk.trunk import Trunk
from wire.tensors import Array

log = logging.getLogger(__name__)


_LOST = (ExpertsLostError, PlacementError)
"""Holders that fail, and those that have left since the forecast by which they were chosen."""


class DistributedMixtral:
    """A Mixtral whose experts are elsewhere.

    Attributes:
        policy: how experts are chosen; may be replaced between steps.
        degrade: go on with the next best experts where some are lost, instead of giving up; tokens that this
            changes are named in the step's record.
        piece_tokens: longer inputs go through the layers in pieces of at most so many tokens, one behind the other, so
            that trunk and nodes work at the same time.
    """

    piece_tokens = 128

    def __init__(self, trunk: Trunk, experts: Experts, policy: Policy, *, degrade: bool = False) -> None:
        self.trunk = trunk
        self._experts = experts
        self.policy = policy
        self.degrade = degrade

    @torch.inference_mode()
    def step(self, inputs: Sequence[SequenceInput], *, all_logits: bool = False) -> tuple[list[Tensor], StepRecord]:
        """Run several sequences one step on, with one round of expert requests per layer for all of them; several
        rounds where they are long (`piece_tokens`).

        Returns:
            Per input logits in fp32 on the CPU, [1, vocab] of its last token, [tokens, vocab] with `all_logits`, or
            [rows, vocab] of the rows that it names; and what the step cost. On an error the caches are cut back to
            what they held.
        """
        past = [input.cache.get_seq_length() for input in inputs]
        try:
            return self._step(inputs, past[0], all_logits)
        except BaseException:
            # Layers before the failure have already appended their keys and values.
            for input, length in zip(inputs, past, strict=True):
                self.trunk.truncate(input.cache, length)
            raise

    def _step(
        self, inputs: Sequence[SequenceInput], position: int, all_logits: bool
    ) -> tuple[list[Tensor], StepRecord]:
        began_ns = time.perf_counter_ns()
        head_ns = 0
        micro_batches = [
            MicroBatch(pieces) for pieces in cut_inputs(inputs, most_tokens=self.piece_tokens, all_logits=all_logits)
        ]
        tallies = [_LayerTally() for _ in range(self.trunk.layers)]
        try:
            for layer in range(self.trunk.layers):
                # While nodes compute for one batch, the next goes through the trunk. It may attend to this one, whose
                # keys and values of this layer are there by now.
                for batch in micro_batches:
                    if layer == 0:
                        mark_ns = time.perf_counter_ns()
                        batch.trunk_pass = start_pass(self.trunk, [piece.inputs for piece in batch.pieces])
                        head_ns += time.perf_counter_ns() - mark_ns
                    else:
                        self._finish(layer - 1, batch, tallies[layer - 1])
                    self._begin(layer, batch, tallies[layer])
            for batch in micro_batches:
                self._finish(self.trunk.layers - 1, batch, tallies[-1])
        except BaseException:
            for batch in micro_batches:
                batch.abandon()
            raise
        mark_ns = time.perf_counter_ns()
        # A GPU is still busy with the head.
        layers = tuple(tally.record(layer) for layer, tally in enumerate(tallies))
        logits: list[list[Tensor]] = [[] for _ in inputs]
        for batch in micro_batches:
            for piece, some in zip(batch.pieces, batch.trunk_pass.logits(all_logits), strict=True):
                logits[piece.number].append(some)
        end_ns = time.perf_counter_ns()
        tokens = sum(len(input.ids) for input in inputs)
        record = StepRecord(
            phase="decode" if all(len(input.ids) == 1 or input.rows for input in inputs) else "prefill",
            position=position,
            tokens=tokens,
            total_ns=end_ns - began_ns,
            head_ns=head_ns + end_ns - mark_ns,
            layers=layers,
        )
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in logits], record

    def _begin(self, layer: int, batch: "MicroBatch", tally: "_LayerTally") -> None:
        """A batch through a layer's trunk, and its experts asked."""
        began_ns = time.perf_counter_ns()
        batch.x, batch.probabilities = batch.trunk_pass.attend(layer)
        batch.choice = self._choose(batch.probabilities, batch.forecast or self._experts.forecast(layer))
        attended_ns = time.perf_counter_ns()
        try:
            batch.pending = self._experts.begin(layer, batch.x, batch.choice.gate)
        except _LOST as lost:
            batch.pending = Ready(self._ask_others(layer, batch, lost))
        # Nodes compute by now: what is for the next layer costs nothing here.
        batch.forecast = self._experts.forecast(layer + 1) if layer + 1 < self.trunk.layers else None
        tally.trunk_ns += attended_ns - began_ns
        tally.dispatch_ns += time.perf_counter_ns() - attended_ns

    def _finish(self, layer: int, batch: "MicroBatch", tally: "_LayerTally") -> None:
        """What a batch's experts made of it."""
        began_ns = time.perf_counter_ns()
        assert batch.pending is not None  # noqa: S101 - it was begun
        try:
            combined = batch.pending.result()
        except _LOST as lost:
            combined = self._ask_others(layer, batch, lost)
        batch.pending = None
        batch.trunk_pass.add(combined.output)
        tally.dispatch_ns += time.perf_counter_ns() - began_ns
        tally.asked.append((batch.choice.gate, batch.choice.forecast))
        tally.dispatches += combined.dispatches
        if batch.choice.degraded:
            tally.degraded += batch.tokens_of_step(batch.choice.degraded)

    def _choose(self, probabilities: Array, forecast: LayerForecast) -> "_Choice":
        if not self.degrade:
            return _Choice(self.policy.select(probabilities, forecast), forecast, ())
        gate, degraded = select_available(self.policy, probabilities, forecast)
        return _Choice(gate, forecast, tuple(degraded.tolist()))

    def _ask_others(self, layer: int, batch: "MicroBatch", lost: Exception) -> ExpertOutput:
        """Where some experts are lost: choose again among those that are left, if that is allowed."""
        if not self.degrade:
            raise lost
        log.warning("%s; going on without", lost)
        # Each turn loses at least one node, and a layer has no more of them than experts.
        for turn in itertools.count(1):
            batch.choice = self._choose(batch.probabilities, self._experts.forecast(layer))
            try:
                return self._experts.begin(layer, batch.x, batch.choice.gate).result()
            except _LOST:
                if turn >= batch.probabilities.shape[1]:
                    raise
        raise AssertionError("counted to the end")


class MicroBatch:
    """Tokens that go through the layers together, and where they are.

    Attributes:
        pieces: of the step's inputs.
        x, probabilities, choice: what its experts were last asked, and why.
        pending: those that have not answered.
        forecast: of the next layer, if it was made already.
    """

    trunk_pass: "TrunkPass"
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
        if hasattr(self, "trunk_pass"):
            self.trunk_pass.abandon()

    def tokens_of_step(self, rows: Sequence[int]) -> Iterator[int]:
        """Where some of its rows are among all tokens of the step."""
        tokens = [piece.first_token + i for piece in self.pieces for i in range(len(piece.inputs.ids))]
        return (tokens[row] for row in rows)


class _LayerTally:
    """A layer's record while its micro_batches pass."""

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


class _Choice(NamedTuple):
    """Gate weights float32 [tokens, experts], what they were chosen by, and which tokens lost experts."""

    gate: Array
    forecast: LayerForecast
    degraded: tuple[int, ...]
