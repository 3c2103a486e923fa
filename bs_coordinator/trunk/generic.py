"""The trunk of any mixture of experts that transformers knows: its own model, stopped wherever experts are needed."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bs_coordinator.config import TrunkDtype, TrunkQuantisation
from bs_coordinator.errors import TrunkError
from bs_coordinator.selection.routing import Routing
from bs_coordinator.trunk.beside import Beside, find_beside
from bs_coordinator.trunk.dtypes import TORCH_DTYPE
from bs_coordinator.trunk.forward_pass import ExpertCall, ForwardPass, current_pass
from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.interface import CacheMark, Trunk, TrunkPass
from bs_coordinator.trunk.meta_model import load_model
from bs_coordinator.trunk.mixed_cache import MixedCache
from bs_coordinator.trunk.rotary import depends_on_length, rotate
from bs_coordinator.trunk.survey import LayerFacts, continues, survey
from wire.errors import BundleError
from wire.tensors import Array

_UNBOUNDED = 1 << 20
"""Context length in tokens of models whose config names none: those without positions."""


class GenericTrunk(Trunk):
    """transformers' model on one device, without its experts. Each sequence is computed by itself.

    Attributes:
        config: of the model's text part, as transformers reads it.
        device, dtype: of the weights and of the arithmetic.
        moe: what is known of each layer with experts.
        beside: modules of each of these layers that are computed while experts are awaited.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: TrunkDtype = "fp32",
        quantisation: TrunkQuantisation = "none",
    ) -> None:  # fmt: skip
        """Load the `trunk/` folder of a bundle, and find out by a trial how its routers choose.

        Args:
            folder: with `config.json` and `model.safetensors`.
            device: as torch names it.
            dtype: of the weights and of the arithmetic.
            quantisation: of the weights of linear layers, but for routers.

        Raises:
            BundleError: files are missing or do not fit together.
            TrunkError: transformers can't run this model without its experts, or its weights can't be quantised so.
        """
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPE[dtype]
        self._model = load_model(folder, device=self.device, dtype=self.dtype, quantisation=quantisation)
        self.config: Any = self._model.config.get_text_config(decoder=True)
        self._by_length = [m for m in self._model.modules() if _has_rope(m) and depends_on_length(m)]
        for rotary in self._by_length:
            rotary.forward = partial(_rotate, rotary)
        head = self._model.get_output_embeddings()
        if head is None:
            raise TrunkError(f"transformers' {type(self._model).__name__} has no head that gives logits")
        head.register_forward_pre_hook(_keep_wanted_rows)
        empty = self.new_cache()
        self._can_truncate, self._pipelines = empty.can_truncate, empty.pipelines
        with torch.inference_mode():
            self.moe: list[LayerFacts] = survey(self._model, self._start, self.new_cache())
            some = list(range(min(8, self.config.vocab_size)))
            self.beside: list[list[Beside]] = find_beside(
                self._model, lambda: self._start(some, self.new_cache()), [facts.module for facts in self.moe]
            )
            self._continues = self._can_truncate or continues(
                self._start, self.new_cache, vocabulary=self.config.vocab_size
            )

    @property
    def layers(self) -> int:
        """Number of layers with experts."""
        return len(self.moe)

    @property
    def max_positions(self) -> int:
        """The model's context length in tokens."""
        return int(getattr(self.config, "max_position_embeddings", None) or _UNBOUNDED)

    @property
    def batch_invariant(self) -> bool:
        """Never promised: products of several tokens may round differently from those of one."""
        return False

    @property
    def packs(self) -> bool:
        """Never: masks and positions are the model's own."""
        return False

    @property
    def rope_by_length(self) -> bool:
        """Whether the rotary embedding of a token depends on how long its sequence is."""
        return bool(self._by_length)

    @property
    def can_truncate(self) -> bool:
        """Whether positions can be removed from a cache: not with recurrent states."""
        return self._can_truncate

    @property
    def continues(self) -> bool:
        """Whether several tokens at once may follow others."""
        return self._continues

    @property
    def pipelines(self) -> bool:
        """Whether a sequence's next tokens may start before its earlier ones have left the last layer."""
        return self._pipelines and self._continues

    @property
    def scored(self) -> bool:
        """Whether every layer's routing has scores."""
        return all(facts.rule is not None for facts in self.moe)

    def new_cache(self) -> MixedCache:
        """An empty cache."""
        return MixedCache(self.config)

    def truncate(self, cache: DynamicCache, tokens: int) -> None:
        """Remove all but the first `tokens` positions; layers that hold fewer stay as they are.

        Raises:
            TrunkError: the cache has recurrent states, and holds more.
        """
        if not self._can_truncate and tokens < cache.get_seq_length():
            raise TrunkError("this model's layers keep states that can't be cut back to an earlier token")
        cache.truncate(tokens)

    def mark(self, cache: DynamicCache) -> CacheMark:
        """What the cache holds now."""
        mark: CacheMark = cache.mark()
        return mark

    def restore(self, cache: DynamicCache, mark: CacheMark) -> None:
        """Bring a cache back to what it held when it was marked."""
        cache.restore(mark)

    def start_pass(self, inputs: Sequence[SequenceInput]) -> TrunkPass:
        """Begin to take sequences through the model, in the order of `inputs`.

        Raises:
            BundleError: the ids of one are packed.
        """
        if any(sequence.packing is not None for sequence in inputs):
            raise BundleError("sequences can't be packed for this model: it is run by transformers")
        return GenericPass(self, inputs)

    def start(self, inputs: SequenceInput) -> ForwardPass:
        """The pass of one sequence, not yet running."""
        length = max(inputs.length, inputs.cache.get_seq_length() + len(inputs.ids))
        return self._start(inputs.ids, inputs.cache, length)

    def _start(self, ids: Sequence[int], cache: DynamicCache, length: int = 0) -> ForwardPass:
        tokens = torch.tensor([list(ids)], device=self.device)

        def call() -> Tensor:
            logits: Tensor = self._model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            return logits

        return ForwardPass(call, length=length)


class GenericPass(TrunkPass):
    """Sequences through transformers' model, each by itself, with their experts asked together."""

    def __init__(self, trunk: GenericTrunk, inputs: Sequence[SequenceInput]) -> None:
        self._trunk = trunk
        self._inputs = inputs
        self._passes = [trunk.start(sequence) for sequence in inputs]
        self._outputs: list[Tensor | None] = [None] * len(inputs)

    def attend(self, layer: int) -> tuple[Array, Routing]:
        calls = [self._ask(layer, i) for i in range(len(self._passes))]
        # The copies to the host also wait for a GPU, so a clock read after them includes its work.
        hidden = _to_host(torch.cat([call.hidden for call in calls]))
        index = torch.cat([call.chosen for call in calls]).cpu().numpy()
        weights = np.zeros((len(hidden), self._trunk.moe[layer].experts), np.float32)
        np.put_along_axis(weights, index, _to_host(torch.cat([call.weights for call in calls])), axis=1)
        return hidden, self._routing(layer, weights)

    def meanwhile(self) -> None:
        for some in self._passes:
            some.meanwhile()

    def add(self, output: Array) -> None:
        moved = torch.from_numpy(output).to(self._trunk.device, self._trunk.dtype)
        self._outputs = list(torch.split(moved, [len(sequence.ids) for sequence in self._inputs]))

    def logits(self, all_logits: bool) -> list[Tensor]:
        found = []
        for some, output, sequence in zip(self._passes, self._outputs, self._inputs, strict=True):
            some.wanted = None if all_logits else sequence.wanted
            logits = some.resume(output)
            if isinstance(logits, ExpertCall):
                raise TrunkError("the model asks experts in more layers than in the trial at the start")
            found.append(logits[0].float().cpu())
        return found

    def abandon(self) -> None:
        for some in self._passes:
            some.abandon()

    def _ask(self, layer: int, number: int) -> ExpertCall:
        """Run one sequence up to the experts of a layer."""
        call = self._passes[number].resume(self._outputs[number])
        if not isinstance(call, ExpertCall) or call.module is not self._trunk.moe[layer].module:
            raise TrunkError(f"the model does not ask the experts of its {layer + 1}th layer with experts")
        for beside in self._trunk.beside[layer]:
            if not beside.before:
                beside.compute_early(self._passes[number], call)
        if layer == 0:
            # The model has made masks and positions: the next piece of this sequence may start.
            self._inputs[number].cache.started += len(self._inputs[number].ids)
        return call

    def _routing(self, layer: int, weights: Array) -> Routing:
        rule = self._trunk.moe[layer].rule
        if rule is None:
            return Routing(weights, None)
        logits = [some.router_logits for some in self._passes if some.router_logits is not None]
        return rule.routing(torch.cat([some.reshape(-1, some.shape[-1]) for some in logits]), weights)


def _has_rope(module: Any) -> bool:
    return isinstance(getattr(module, "rope_type", None), str) and hasattr(module, "original_inv_freq")


def _rotate(rotary: Any, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of tokens whose frequencies depend on their own sequence's length (`trunk.rotary`)."""
    running = current_pass()
    positions = position_ids[0].tolist()
    return rotate(rotary, hidden, positions, [running.length if running else 0] * len(positions))


def _keep_wanted_rows(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before the head, the largest product: drop the tokens whose logits are not wanted."""
    running = current_pass()
    if running is None or running.wanted is None:
        return arguments
    hidden, *others = arguments
    wanted = torch.tensor(running.wanted, dtype=torch.int64, device=hidden.device)
    return hidden[:, wanted], *others


def _to_host(tensor: Tensor) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array
