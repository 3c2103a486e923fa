"""A model's own forward pass as a coroutine that stops wherever experts are needed.

transformers asks a registered function for the output of a layer's experts. The function registered here switches to
the greenlet that runs the step, and returns what it is resumed with. Any number of passes may be under way at once.
A pass lives in the thread that started it, within one step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bs_coordinator.errors import AnswerError, TrunkError
from common.errors import WdmoeError, one_line

EXPERTS_IMPLEMENTATION = "wdmoe"
"""Name under which transformers knows the function."""


class ExpertCall(NamedTuple):
    """What a model asks of a layer's experts.

    Attributes:
        module: the experts' module, without weights.
        hidden: the experts' input [tokens, hidden].
        chosen: indices of the chosen experts, int64 [tokens, k].
        weights: of the chosen experts [tokens, k].
    """

    module: nn.Module
    hidden: Tensor
    chosen: Tensor
    weights: Tensor


class ForwardPass:
    """One call of a model, which stops at each layer's experts.

    Attributes:
        length: of the sequence, for rotary embeddings that depend on it.
        wanted: rows whose logits are wanted, decided before the last resumption; None for all.
        router_logits: the last ones that a router computed in this pass.
        owed: computations that must be done before the pass is resumed, and can wait until experts are asked.
        ahead: computations that may be done while experts are awaited.
        early: inputs and results of modules that were computed ahead.
    """

    def __init__(self, call: Callable[[], Tensor], *, length: int = 0) -> None:
        """Nothing is run yet.

        Args:
            call: runs the model and returns its logits, [1, tokens, vocab].
            length: of the sequence.
        """
        self.length = length
        self.wanted: list[int] | None = None
        self.router_logits: Tensor | None = None
        self.owed: list[Callable[[], None]] = []
        self.ahead: list[Callable[[], None]] = []
        self.early: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._greenlet = _PassGreenlet(call)
        self._greenlet.forward_pass = self

    def resume(self, output: Tensor | None = None) -> "ExpertCall | Tensor":
        """Run on to the next experts or to the end.

        Args:
            output: of the experts that the pass stopped at, [tokens, hidden]; None to start.

        Returns:
            What is asked of the next experts, or the logits.

        Raises:
            AnswerError: the model failed.
        """
        self._greenlet.parent = getcurrent()
        try:
            self._compute(self.owed)
            self.ahead.clear()
            found: ExpertCall | Tensor = self._greenlet.switch() if output is None else self._greenlet.switch(output)
        except WdmoeError:
            raise
        except Exception as error:
            raise AnswerError(f"transformers failed: {type(error).__name__}: {one_line(error)}") from error
        return found

    def meanwhile(self) -> None:
        """While experts are awaited: compute what does not depend on them."""
        self._compute(self.owed)
        self._compute(self.ahead)

    @staticmethod
    def _compute(work: list[Callable[[], None]]) -> None:
        while work:
            work.pop(0)()

    def abandon(self) -> None:
        """End the pass where it is."""
        if not self._greenlet.dead:
            self._greenlet.parent = getcurrent()
            self._greenlet.throw(GreenletExit)


def current_pass() -> ForwardPass | None:
    """The pass that this code runs in; None outside of any."""
    return getattr(getcurrent(), "forward_pass", None)


class _PassGreenlet(greenlet):  # type: ignore[misc] # greenlet is untyped here
    forward_pass: ForwardPass


def _ask_experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
    current = getcurrent()
    if not isinstance(current, _PassGreenlet) or current.parent is None:
        raise TrunkError("this model's experts are elsewhere: run it as a ForwardPass")
    flat = hidden.reshape(-1, hidden.shape[-1])
    k = index.shape[-1]
    output: Tensor = current.parent.switch(ExpertCall(module, flat, index.reshape(-1, k), weights.reshape(-1, k)))
    return output.to(hidden.dtype).view(hidden.shape)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _ask_experts)
