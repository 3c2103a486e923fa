"""A trial of a model without its experts: which layers ask them, and how their routers choose."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bs_coordinator.errors import AnswerError, TrunkError
from bs_coordinator.trunk.forward_pass import ExpertCall, ForwardPass, current_pass
from bs_coordinator.trunk.mixed_cache import MixedCache
from bs_coordinator.trunk.routing_rule import RoutingRule, find_rule

_TOKENS = 32

Start = Callable[[list[int], MixedCache], ForwardPass]
"""Makes a pass of token ids that follow what a cache holds."""


class LayerFacts(NamedTuple):
    """What is known of one layer with experts.

    Attributes:
        module: the experts' module, without weights.
        experts: number of experts.
        rule: how the router chooses; None if that was not found out.
    """

    module: nn.Module
    experts: int
    rule: RoutingRule | None


def survey(model: Any, start: Start, cache: MixedCache) -> list[LayerFacts]:
    """Run random tokens through a model whose experts return zeros, and watch.

    Where a layer's rule is found, a hook on its router keeps the logits in the pass (`ForwardPass.router_logits`).

    Raises:
        TrunkError: the model can't be run without its experts.
    """
    outputs: list[tuple[nn.Module, int | None, Tensor]] = []
    handles = [module.register_forward_hook(_watch(outputs)) for module in model.modules()]
    found: list[LayerFacts] = []
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    running = start(torch.randint(vocabulary, (_TOKENS,), generator=random).tolist(), cache)
    try:
        call = running.resume()
        while isinstance(call, ExpertCall):
            found.append(_facts(model, call, outputs))
            outputs.clear()
            call = running.resume(torch.zeros_like(call.hidden))
    except AnswerError as error:
        raise TrunkError(f"this model can't be run without its experts: {error}") from error
    finally:
        running.abandon()
        for handle in handles:
            handle.remove()
    if not found or len({id(facts.module) for facts in found}) < len(found):
        raise TrunkError("this model asks no experts, or those of one layer more than once: it can't be run here")
    return found


def continues(start: Start, new_cache: Callable[[], MixedCache], *, vocabulary: int) -> bool:
    """Whether a model with recurrent states gives several tokens that follow others what they get with them."""
    ids = torch.randint(vocabulary, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = _logits(start(ids, new_cache()))
    cache = new_cache()
    first = _logits(start(ids[:13], cache))
    cache.started = 13
    pieces = torch.cat([first, _logits(start(ids[13:], cache))])
    # Rounding moves the second piece as far as the first; a forgotten state moves only the second.
    apart = (pieces - whole).norm(dim=1) / whole.norm(dim=1)
    return bool(apart[13:].max() <= 8 * apart[:13].max() + 1e-4)


def _logits(running: ForwardPass) -> Tensor:
    call = running.resume()
    while isinstance(call, ExpertCall):
        call = running.resume(torch.zeros_like(call.hidden))
    return call[0].float()


def _watch(outputs: list[tuple[nn.Module, int | None, Tensor]]) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that adds what modules return: module, position in a tuple, tensor."""

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, None, output))
        elif isinstance(output, tuple):
            outputs.extend((module, i, value) for i, value in enumerate(output) if isinstance(value, Tensor))

    return hook


def _facts(model: nn.Module, call: ExpertCall, outputs: list[tuple[nn.Module, int | None, Tensor]]) -> LayerFacts:
    experts = int(getattr(call.module, "num_experts", 0))
    if experts <= int(call.chosen.max()):
        raise TrunkError(f"transformers' {type(call.module).__name__} does not say how many experts it has")
    vectors = _vectors(model, call.module, experts)
    for module, position, value in outputs:
        if value.is_floating_point() and value.shape[-1] == experts and value.numel() == _TOKENS * experts:
            rule = find_rule(value.reshape(-1, experts), call.chosen, call.weights, vectors)
            if rule is not None:
                module.register_forward_hook(_keep_logits(position))
                return LayerFacts(call.module, experts, rule)
    return LayerFacts(call.module, experts, None)


def _keep_logits(position: int | None) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        running = current_pass()
        if running is not None:
            running.router_logits = output if position is None else output[position]

    return hook


def _vectors(model: nn.Module, module: nn.Module, experts: int) -> list[Tensor]:
    """Parameters and buffers [experts] of the layer that the experts belong to."""
    (path,) = (name for name, other in model.named_modules() if other is module)
    layer = model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
    return [value.reshape(-1) for value in (*layer.parameters(), *layer.buffers()) if value.numel() == experts]
