"""One forward step of the distributed model: the trunk runs here, the experts elsewhere."""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from time import perf_counter_ns, time_ns

import torch
from torch import Tensor

from bs_coordinator.engine.experts import ExpertOutput, Experts, LargestAnswer, Pending, Ready
from bs_coordinator.engine.micro_batch import Choice, LayerTally, MicroBatch
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.engine.waiting import NoListener, WaitListener
from bs_coordinator.errors import AnswerError, ExpertsLostError, PlacementError
from bs_coordinator.selection import Policy, Routing
from bs_coordinator.selection.degraded import gate_of_slices, select_available, select_wanted
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.trunk.inputs import SequenceInput, cut_inputs
from bs_coordinator.trunk.interface import CacheMark, Trunk
from common import real_time
from wire.tensors import all_finite

log = logging.getLogger(__name__)

_MOST_REPEATS = 3
"""Attempts at a step whose logits are not finite, each without the node that gave the largest answer."""
_SUSPICIOUS_EXCESS = 20.0
"""A node's answer this many times as large as the manifest's probes may be at fault."""

_LOST = (ExpertsLostError, PlacementError)
"""A holder failed, or left after the forecast by which it was chosen."""


class _NotFiniteError(Exception):
    """A step's hidden states or logits hold NaN or infinity; `largest` is the largest answer of a node before that."""

    def __init__(self, largest: LargestAnswer | None = None) -> None:
        super().__init__("the logits are not finite")
        self.largest = largest


class DistributedModel:
    """A mixture of experts whose experts run elsewhere.

    Attributes:
        trunk: the part that runs here.
        policy: how experts are chosen; may be replaced between steps.
        degrade: if experts are lost, continue with the next best ones instead of failing. The tokens affected are
            named in the step's record.
        piece_tokens: longer inputs are cut into pieces of at most this many tokens. While the nodes compute for one
            piece, the trunk works on the next.
        raises_priority: steps of few tokens have real-time priority (`common.real_time`).
    """

    piece_tokens = 128
    raises_priority = False

    def __init__(
        self, trunk: Trunk, experts: Experts, policy: Policy, *, degrade: bool = False,
        quarantine: Callable[[str, str], None] | None = None, acquit: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """Nothing is run yet.

        Args:
            quarantine: leaves a node out for a reason, if its answers made logits infinite; None if there are no nodes.
            acquit: uses such a node again, because the logits are infinite without it too.
        """
        self.trunk = trunk
        self._experts = experts
        self.policy = policy
        self.degrade = degrade
        self._quarantine = quarantine
        self._acquit = acquit
        self._waits: WaitListener = NoListener()

    @torch.inference_mode()
    def step(
        self, inputs: Sequence[SequenceInput], *, all_logits: bool = False, waits: WaitListener | None = None
    ) -> tuple[list[Tensor], StepRecord]:
        """Advance several sequences by one step, with one expert request per layer for all of them together, or one
        per piece where inputs are longer than `piece_tokens`.

        Args:
            inputs: at least one sequence's new tokens.
            all_logits: return the logits of all tokens.
            waits: told when nodes are awaited.

        Returns:
            For each input its logits, fp32 on the CPU: [1, vocab] for the last token, [tokens, vocab] with
            `all_logits`, or [rows, vocab] for the rows that the input names; and the record of the step.

        Raises:
            WdmoeError: an expert is unavailable or failed, or the logits are not finite, which no node is to blame
                for. The caches hold what they held before.
        """
        tokens = sum(len(sequence.ids) for sequence in inputs)
        urgent = self.raises_priority and tokens <= real_time.MOST_TOKENS
        if waits is not None:
            self._waits = waits
        try:
            with real_time.raised() if urgent else nullcontext():
                return self._repeat_step(inputs, all_logits)
        finally:
            self._waits.step_ends()
            self._waits = NoListener()

    def _repeat_step(self, inputs: Sequence[SequenceInput], all_logits: bool) -> tuple[list[Tensor], StepRecord]:
        """Run a step, again without the nodes that are at fault if its logits are not finite."""
        marks = [self.trunk.mark(sequence.cache) for sequence in inputs]
        accused: list[str] = []
        try:
            for _ in range(_MOST_REPEATS):
                try:
                    return self._step(inputs, marks[0].tokens, all_logits)
                except _NotFiniteError as error:
                    self._restore(inputs, marks)
                    accused.append(self._find_fault(error.largest))
                except BaseException:
                    self._restore(inputs, marks)
                    raise
            raise AnswerError(f"the logits are not finite, after {_MOST_REPEATS} attempts with other nodes")
        except AnswerError:
            # Without these nodes it is the same: it is the prompt's or the model's fault, and other callers need them.
            for node in accused:
                if self._acquit is not None:
                    self._acquit(node)
            raise

    def _restore(self, inputs: Sequence[SequenceInput], marks: Sequence[CacheMark]) -> None:
        # Layers before a failure have already changed the caches. The stack restores every cache, even if one of them
        # fails: the sequences are stepped again alone.
        with ExitStack() as stack:
            for sequence, mark in zip(inputs, marks, strict=True):
                stack.callback(self.trunk.restore, sequence.cache, mark)

    def _find_fault(self, largest: LargestAnswer | None) -> str:
        """Leave out the node whose answers made the logits infinite, and return its name.

        Raises:
            AnswerError: no node's answer was suspiciously large.
        """
        if self._quarantine is None or largest is None or largest.excess <= _SUSPICIOUS_EXCESS:
            raise AnswerError(
                "the logits are not finite, and no node's answer was unusually large: do the trunk's weights or its "
                "--dtype suit this model?"
            )
        why = f"its answer was {largest.excess:.2g} times as large as the manifest's probes, and the logits not finite"
        self._quarantine(largest.node, why)
        return largest.node

    def _step(
        self, inputs: Sequence[SequenceInput], position: int, all_logits: bool
    ) -> tuple[list[Tensor], StepRecord]:
        began_unix_ns, began_ns = time_ns(), perf_counter_ns()
        most_tokens = self.piece_tokens if self.trunk.pipelines else sys.maxsize
        batches = [MicroBatch(p) for p in cut_inputs(inputs, most_tokens=most_tokens, all_logits=all_logits)]
        tallies = [LayerTally() for _ in range(self.trunk.layers)]
        try:
            embedding_ns = self._run_layers(batches, tallies)
        except BaseException as error:
            with ExitStack() as stack:
                for batch in reversed(batches):
                    stack.callback(batch.abandon)
            if isinstance(error, _NotFiniteError):
                raise _NotFiniteError(_largest(tallies)) from None
            raise
        head_began_ns = perf_counter_ns()
        # Made before the logits are fetched: a GPU is still busy with the head.
        layers = tuple(tally.record(layer) for layer, tally in enumerate(tallies))
        logits = _collect_logits(batches, len(inputs), all_logits)
        if not all(_finite(some) for some in logits):
            raise _NotFiniteError(_largest(tallies))
        end_ns = perf_counter_ns()
        record = StepRecord(
            phase="decode" if all(len(s.ids) == 1 or (s.rows and not s.prompt) for s in inputs) else "prefill",
            position=position,
            tokens=sum(len(sequence.ids) for sequence in inputs),
            total_ns=end_ns - began_ns,
            head_ns=embedding_ns + end_ns - head_began_ns,
            layers=layers,
            began_unix_ns=began_unix_ns,
        )
        return logits, record

    def _run_layers(self, batches: Sequence[MicroBatch], tallies: Sequence[LayerTally]) -> int:
        """Take all micro-batches through all layers; returns the time spent on embeddings, in ns.

        While nodes compute for one micro-batch, the trunk works on the next. That one may attend to its predecessor,
        whose keys and values of the same layer are in the cache by then.
        """
        embedding_ns = 0
        for layer, tally in enumerate(tallies):
            for batch in batches:
                if layer == 0:
                    began_ns = perf_counter_ns()
                    batch.start(self.trunk)
                    embedding_ns += perf_counter_ns() - began_ns
                else:
                    self._add_experts(layer - 1, batch, tallies[layer - 1])
                self._ask_experts(layer, batch, tally)
        for batch in batches:
            self._add_experts(len(tallies) - 1, batch, tallies[-1])
        return embedding_ns

    def _ask_experts(self, layer: int, batch: MicroBatch, tally: LayerTally) -> None:
        """Run a layer's first half, choose experts and send the request."""
        began_ns = perf_counter_ns()
        batch.attend(layer)
        if not all_finite(batch.hidden):  # nodes would drop such a request
            raise _NotFiniteError
        batch.choice = self._choose(batch.routing, batch.forecast or self._experts.forecast(layer))
        chosen_ns = perf_counter_ns()
        try:
            batch.pending = self._begin(layer, batch)
        except _LOST as lost:
            batch.pending = Ready(self._ask_remaining(layer, batch, lost))
        # The nodes are computing now, so work that does not depend on them costs no time here.
        batch.trunk_pass.meanwhile()
        batch.forecast = self._experts.forecast(layer + 1) if layer + 1 < self.trunk.layers else None
        tally.trunk_ns += chosen_ns - began_ns
        tally.dispatch_ns += perf_counter_ns() - chosen_ns

    def _add_experts(self, layer: int, batch: MicroBatch, tally: LayerTally) -> None:
        """Wait for a layer's experts and add their output to the residual stream."""
        began_ns = perf_counter_ns()
        assert batch.pending is not None  # noqa: S101 - set by _ask_experts
        self._waits.wait_begins()
        try:
            combined = batch.pending.result()
        except _LOST as lost:
            combined = self._ask_remaining(layer, batch, lost)
        finally:
            self._waits.wait_ends()
        batch.pending = None
        batch.trunk_pass.add(combined.output)
        tally.dispatch_ns += perf_counter_ns() - began_ns
        tally.add(batch, combined)

    def _choose(self, routing: Routing, forecast: LayerForecast) -> Choice:
        if not self.degrade:
            # Lost experts are asked all the same: the step fails instead of giving another answer.
            return Choice(select_wanted(self.policy, routing, forecast), forecast, ())
        gate, degraded = select_available(self.policy, routing, forecast)
        return Choice(gate, forecast, tuple(degraded.tolist()), forecast.left)

    def _begin(self, layer: int, batch: MicroBatch) -> Pending:
        return self._experts.begin(layer, batch.hidden, gate_of_slices(batch.choice.gate, batch.choice.left))

    def _ask_remaining(self, layer: int, batch: MicroBatch, lost: Exception) -> ExpertOutput:
        """After a loss, choose again among the experts that remain, if `degrade` allows it."""
        if not self.degrade:
            raise lost
        log.warning("%s; continuing without it", lost)
        # Each attempt loses at least one node. Of slices, there may be more nodes than experts.
        for _ in range(max(batch.routing.weights.shape[1], len(batch.choice.forecast.fixed_s))):
            batch.choice = self._choose(batch.routing, self._experts.forecast(layer))
            try:
                return self._begin(layer, batch).result()
            except _LOST as error:
                lost = error
        raise lost


def _largest(tallies: Sequence[LayerTally]) -> LargestAnswer | None:
    found = [tally.largest for tally in tallies if tally.largest is not None]
    return max(found, key=lambda answer: answer.excess, default=None)


def _finite(logits: Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a tenth of the time of looking at each.
    return math.isfinite(float(logits.sum())) or bool(torch.isfinite(logits).all())


def _collect_logits(batches: Sequence[MicroBatch], sequences: int, all_logits: bool) -> list[Tensor]:
    """Each sequence's logits, joined from its pieces."""
    parts: list[list[Tensor]] = [[] for _ in range(sequences)]
    for batch in batches:
        for piece, logits in batch.logits(all_logits=all_logits):
            parts[piece.number].append(logits)
    return [some[0] if len(some) == 1 else torch.cat(some) for some in parts]
