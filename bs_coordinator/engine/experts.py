"""What the model asks of its experts, wherever they run: the one interface between the engine and dispatch."""

from typing import NamedTuple, Protocol

from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array


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
