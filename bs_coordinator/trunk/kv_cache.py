"""A KV cache at a fixed address on a GPU, which captured graphs can append to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

FIRST_CAPACITY = 256


@torch.inference_mode()
def keep_branch(cache: DynamicCache, past: int, rows: Sequence[int]) -> None:
    """Of the positions after the first `past`, keep some, so that the cache holds a single sequence.

    Args:
        cache: without a slab.
        past: number of positions before the last step.
        rows: of the step's tokens, those to keep, in ascending order.
    """
    for layer in cache.layers:
        for number, row in enumerate(rows):
            if row != number:
                for part in (layer.keys, layer.values):
                    part[:, :, past + number] = part[:, :, past + row]
        if (excess := layer.get_seq_length() - past - len(rows)) > 0:
            layer.crop(-excess)


class SlabCache(DynamicCache):  # type: ignore[misc] # transformers is untyped here
    """Keys and values of one sequence in a single tensor that doubles in capacity when it is full.

    A conversation takes at most twice the memory of its tokens (Mixtral-8x7B in bf16: 128 KiB per token). The capacity
    does not grow beyond the model's context, unless a packed step holds more tokens.

    Attributes:
        slab: [layers, 2 (keys, values), key-value heads, capacity, head size]; positions past a layer's length are
            undefined.
        layers: one view of the slab per layer.
    """

    def __init__(self, config: Any, *, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """An empty cache.

        Args:
            config: of the model.
            head_dim: size of a head.
            device: where the slab lies.
            dtype: of keys and values.
        """
        super().__init__(config=config)
        count = config.num_hidden_layers
        self._max_positions: int = config.max_position_embeddings
        self.slab = torch.empty(
            (count, 2, config.num_key_value_heads, FIRST_CAPACITY, head_dim), device=device, dtype=dtype
        )
        self.layers: list[SlabLayer] = [SlabLayer(self, i) for i in range(count)]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` positions, keeping those that are held. May move the slab."""
        held = self.slab.shape[3]
        if tokens <= held:
            return
        capacity = max(tokens, min(2 * held, self._max_positions))
        capacity += -capacity % FIRST_CAPACITY
        layers, pair, heads, _, dim = self.slab.shape
        slab = self.slab.new_empty((layers, pair, heads, capacity, dim))
        slab[:, :, :, :held] = self.slab
        self.slab = slab


class SlabLayer(DynamicLayer):  # type: ignore[misc] # transformers is untyped here
    """One layer's part of a slab.

    Attributes:
        length: number of positions held.
    """

    def __init__(self, cache: SlabCache, index: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.length = 0
        self._cache = cache
        self._index = index

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, each [1, heads, tokens, dim]; returns all of them."""
        end = self.length + key_states.shape[-2]
        self._cache.reserve(end)
        keys, values = self._cache.slab[self._index]
        keys[:, self.length : end] = key_states[0]
        values[:, self.length : end] = value_states[0]
        self.length = end
        return keys[None, :, :end], values[None, :, :end]

    def get_seq_length(self) -> int:
        """Number of positions held."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; as in transformers, their number is passed as a negative value."""
        self.length -= abs(tokens_to_remove)
