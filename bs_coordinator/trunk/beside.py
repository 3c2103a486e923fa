"""Modules beside the experts, such as shared experts: computed while the answers of the others are awaited.

Models run such a module right before their experts or right after them, on the same input. Before: the pass gets a
tensor that is filled in later. After: the result is computed early and kept for the call. Both are safe only if nothing
else depends on the order, which a trial shows: tensors not filled in yet are NaN there.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bs_coordinator.trunk.forward_pass import ExpertCall, ForwardPass, current_pass
from bs_coordinator.trunk.quantised import QuantisedLinear

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Beside:
    """A module that takes the same input as a layer's experts.

    Attributes:
        module: replaced by an instance's own `forward` while it is installed.
        before: whether the model calls it before the experts.
        dimensions: of the input that it takes.
        poisoned: whether results that are not known yet are NaN.
    """

    module: nn.Module
    before: bool
    dimensions: int
    poisoned: bool = False

    def install(self) -> None:
        """Compute the module while experts are awaited, from now on."""
        self._compute: Callable[[Tensor], Tensor] = self.module.forward
        self.module.forward = self._deferred if self.before else self._computed_early

    def remove(self) -> None:
        """Compute the module where the model calls it."""
        self.module.forward = self._compute

    def compute_early(self, running: ForwardPass, call: ExpertCall) -> None:
        """Let a module that follows the experts be computed while the pass waits for them."""
        x = call.hidden if self.dimensions == 2 else call.hidden[None]

        def compute() -> None:
            running.early[self.module] = x, self._compute(x)

        running.ahead.append(compute)

    def _deferred(self, x: Tensor) -> Tensor:
        running = current_pass()
        if running is None:
            return self._compute(x)
        later = torch.full_like(x, torch.nan) if self.poisoned else torch.empty_like(x)

        def compute() -> None:
            later.copy_(self._compute(x))

        running.owed.append(compute)
        return later

    def _computed_early(self, x: Tensor) -> Tensor:
        running = current_pass()
        known = running.early.pop(self.module, None) if running else None
        if known is None or not _same(known[0], x):
            return self._compute(x)
        return known[1].view(x.shape)


def find_beside(
    model: nn.Module, new_pass: Callable[[], ForwardPass], experts: Sequence[nn.Module]
) -> list[list[Beside]]:
    """The modules that can be computed while experts are awaited, installed, for each layer with experts.

    Args:
        model: transformers' model.
        new_pass: starts a pass of some tokens, always the same, without past.
        experts: the experts' module of each layer.
    """
    watcher = _Watcher(experts)
    handles = [h for m in model.modules() for h in watcher.watch(m)]
    try:
        plain = _try(new_pass(), watcher.stop)
        watcher.stop(None)
    finally:
        for handle in handles:
            handle.remove()
    found = watcher.found
    every = [beside for layer in found for beside in layer]
    if not every:
        return found
    for beside in every:
        beside.poisoned = True
        beside.install()
    running = new_pass()
    reached = iter(found)

    def compute_ahead(call: ExpertCall) -> None:
        for beside in next(reached):
            if not beside.before:
                beside.compute_early(running, call)

    tried = _try(running, compute_ahead)
    if all(_close(a, b) for a, b in zip(plain, tried, strict=True)):
        for beside in every:
            beside.poisoned = False
        return found
    log.info("shared experts are not computed while the others are awaited: the result would differ")
    for beside in every:
        beside.remove()
    return [[] for _ in found]


@dataclass(eq=False)
class _Call:
    """A call of a module: its input if that is all, and whether it is one that could be computed beside experts."""

    module: nn.Module
    x: Tensor | None
    within: "_Call | None"
    fits: bool = False


@dataclass
class _Watcher:
    """Notes the calls of modules between one layer's experts and the next."""

    experts: Sequence[nn.Module]
    found: list[list[Beside]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._open: list[_Call] = []
        self._calls: list[_Call] = []
        self._inputs: list[Tensor] = []

    def watch(self, module: nn.Module) -> tuple[Any, Any]:
        """Hook a module; returns the handles."""
        return module.register_forward_pre_hook(self._enter, with_kwargs=True), module.register_forward_hook(
            self._leave
        )

    def stop(self, call: ExpertCall | None) -> None:
        """The model has stopped at a layer's experts, or has ended."""
        if self.found:
            # Whatever follows a layer's experts comes before those of the next.
            self.found[-1] += self._beside(self._inputs[-1], before=False)
        if call is not None:
            self._inputs.append(call.hidden)
            self.found.append(self._beside(call.hidden, before=True))
        self._calls.clear()

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        alone = len(arguments) == 1 and not keywords and isinstance(arguments[0], Tensor)
        self._open.append(_Call(module, arguments[0] if alone else None, self._open[-1] if self._open else None))

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        call = self._open.pop()
        matrices = sum(weight.dim() > 1 for weight in module.parameters())
        matrices += sum(isinstance(part, QuantisedLinear) for part in module.modules())
        call.fits = (
            call.x is not None
            and isinstance(output, Tensor)
            and output.shape == call.x.shape
            and matrices > 1
            and not any(part in self.experts for part in module.modules())
        )
        self._calls.append(call)

    def _beside(self, hidden: Tensor, *, before: bool) -> list[Beside]:
        fitting = [c for c in self._calls if c.fits and c.x is not None and _same(c.x, hidden)]
        outermost = [c for c in fitting if not any(c.within is other for other in fitting)]
        return [Beside(c.module, before, c.x.dim()) for c in outermost if c.x is not None]


def _try(running: ForwardPass, on_stop: Callable[[ExpertCall], None]) -> list[Tensor]:
    """Run a pass with made-up experts; returns what it gave the experts, and its logits."""
    seen: list[Tensor] = []
    try:
        call = running.resume()
        while isinstance(call, ExpertCall):
            on_stop(call)
            seen += [call.hidden, call.weights]
            running.meanwhile()
            call = running.resume(0.1 * call.hidden.roll(1, dims=-1))
    finally:
        running.abandon()
    return [*seen, call]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).norm() <= 1e-3 * a.float().norm())
