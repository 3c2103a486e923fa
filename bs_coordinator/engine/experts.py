"""The interface between the engine and whatever runs the experts: nodes (`bs_coordinator.dispatch`) or this process."""

from typing import NamedTuple, Protocol

from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.selection.forecast import LayerForecast
from wire.tensors import Array


class LargestAnswer(NamedTuple):
    """The node whose answer was the largest for its layer.

    Attributes:
        excess: its largest ‖output‖ / ‖input‖ of a row, relative to that of the manifest's probes.
    """

    node: str
    excess: float


class ExpertOutput(NamedTuple):
    """The combined output of one layer's experts for some tokens.

    Attributes:
        output: float32 [tokens, hidden], Σ over experts of gate weight × expert output.
        dispatches: one record per request to a node.
        largest: the node to suspect first if the model's output turns out not to be finite; None if that is not known.
    """

    output: Array
    dispatches: tuple[DispatchRecord, ...] = ()
    largest: LargestAnswer | None = None


class Pending(Protocol):
    """An expert request that is under way."""

    def result(self) -> ExpertOutput:
        """Wait for the output. May be called once.

        Raises:
            WdmoeError: an expert is unavailable or failed.
        """

    def cancel(self) -> None:
        """Give up the request: `result` will not be called."""


class Ready(NamedTuple):
    """A request whose output is already known; implements `Pending`."""

    output: ExpertOutput

    def result(self) -> ExpertOutput:
        return self.output

    def cancel(self) -> None:
        pass


class Experts(Protocol):
    """All experts of a model, wherever they run."""

    def begin(self, layer: int, hidden: Array, gate: Array) -> Pending:
        """Start one layer's experts. Several requests may be under way at once.

        Args:
            layer: index of the layer.
            hidden: float32 [tokens, hidden].
            gate: float32 [tokens, experts], zero where an expert is not chosen; or [tokens, experts · slices] where
                the forecast says that only some slices are left.

        Raises:
            WdmoeError: an expert is unavailable.
        """

    def forecast(self, layer: int) -> LayerForecast:
        """Predicted cost of asking this layer's experts now."""
