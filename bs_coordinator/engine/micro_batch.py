"""Tokens of a step that go through the layers together, and the records kept while they do."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bs_coordinator.engine.experts import ExpertOutput, LargestAnswer, Pending
from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.routing import Routing
from bs_coordinator.trunk.inputs import Piece
from bs_coordinator.trunk.interface import Trunk, TrunkPass
from wire.tensors import Array


class Choice(NamedTuple):
    """Which experts a micro-batch asks in one layer.

    Attributes:
        gate: weights, float32 [tokens, experts], zero where an expert is not asked.
        forecast: predicted costs that the choice was based on.
        degraded: rows of the micro-batch whose preferred experts were unavailable, or lacked slices.
        left: slices to ask, as of `LayerForecast`; None to ask experts with all their slices.
    """

    gate: Array
    forecast: LayerForecast
    degraded: tuple[int, ...]
    left: NDArray[np.bool_] | None = None


class MicroBatch:
    """Pieces of the step's sequences that go through the layers together, and how far they have come.

    Attributes:
        pieces: parts of the step's inputs.
        hidden: the experts' input in the current layer, float32 [tokens, hidden].
        routing: of the tokens in the current layer.
        choice: the experts asked in the current layer.
        pending: the current layer's request; None when none is under way.
        forecast: of the next layer, if it was already made.
    """

    trunk_pass: TrunkPass
    hidden: Array
    routing: Routing
    choice: Choice

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        self.pending: Pending | None = None
        self.forecast: LayerForecast | None = None

    def start(self, trunk: Trunk) -> None:
        """Look up the tokens' embeddings. Needs the caches to hold what earlier micro-batches have added."""
        self.trunk_pass = trunk.start_pass([piece.inputs for piece in self.pieces])

    def attend(self, layer: int) -> None:
        """Run the first half of a layer: `hidden` and `routing`."""
        self.hidden, self.routing = self.trunk_pass.attend(layer)

    def logits(self, *, all_logits: bool) -> Iterator[tuple[Piece, Tensor]]:
        """After the last layer: each piece's logits, fp32 on the CPU."""
        return zip(self.pieces, self.trunk_pass.logits(all_logits), strict=True)

    def abandon(self) -> None:
        """Give up the step, at any point."""
        if self.pending is not None:
            self.pending.cancel()
        if hasattr(self, "trunk_pass"):
            self.trunk_pass.abandon()

    def degraded_tokens(self) -> list[int]:
        """The degraded rows' positions among all tokens of the step."""
        if not self.choice.degraded:
            return []
        tokens = [piece.first_token + i for piece in self.pieces for i in range(len(piece.inputs.ids))]
        return [tokens[row] for row in self.choice.degraded]


class LayerTally:
    """Adds up one layer's record while the step's micro-batches pass through the layer."""

    def __init__(self) -> None:
        self.trunk_ns = self.dispatch_ns = 0
        self.largest: LargestAnswer | None = None
        self._asked: list[tuple[Array, LayerForecast]] = []
        self._dispatches: list[DispatchRecord] = []
        self._degraded: list[int] = []

    def add(self, batch: MicroBatch, combined: ExpertOutput) -> None:
        """Take in what a micro-batch asked, once it was answered."""
        self._asked.append((batch.choice.gate, batch.choice.forecast))
        self._dispatches += combined.dispatches
        if combined.largest is not None and (self.largest is None or combined.largest.excess > self.largest.excess):
            self.largest = combined.largest
        self._degraded += batch.degraded_tokens()

    def record(self, layer: int) -> LayerRecord:
        """The layer's record."""
        return LayerRecord(
            layer=layer,
            trunk_ns=self.trunk_ns,
            dispatch_ns=self.dispatch_ns,
            asked=tuple(self._asked),
            dispatches=tuple(self._dispatches),
            degraded=tuple(self._degraded),
        )
