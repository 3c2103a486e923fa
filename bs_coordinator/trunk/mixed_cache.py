"""The cache of one sequence for any model: keys and values, and the states of layers without them.

Several pieces of a prompt may be on their way through the model at once. transformers makes masks and positions when a
piece starts, for all layers, from what they hold: by then the later layers have not seen the earlier pieces. Here they
are counted from the start.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from bs_coordinator.trunk.interface import CacheMark

_APPENDED = (DynamicLayer, DynamicIndexedLayer, DummyLayer)


class MixedCache(DynamicCache):  # type: ignore[misc] # transformers is untyped here
    """The cache of one sequence.

    Attributes:
        started: number of positions whose pass through the model has started.
    """

    def __init__(self, config: Any) -> None:
        """An empty cache for a model with this config."""
        super().__init__(config=config)
        self.started = 0
        # Layers that drop keys outside their window could not be cut any more. The mask hides those keys anyway.
        self.layers: list[Any] = [
            DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in self.layers
        ]

    @property
    def can_truncate(self) -> bool:
        """Whether positions can be removed: not if a layer keeps a state instead of each position's keys."""
        return all(type(layer) in _APPENDED for layer in self.layers)

    @property
    def pipelines(self) -> bool:
        """Whether a piece may start before the piece before it has reached the last layer."""
        return all(type(layer) in (*_APPENDED, LinearAttentionLayer) for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions that a layer holds; of layer 0, including those that are on their way to it."""
        if layer_idx:
            return int(super().get_seq_length(layer_idx))
        attention = (layer for layer in self.layers if isinstance(layer, CacheLayerMixin))
        return max(self.started, next((layer.get_seq_length() for layer in attention), 0))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys that the next `query_length` positions see, and the position of the first."""
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return (length, offset) if offset else (max(length, self.started + query_length), 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.get_seq_length()

    def truncate(self, tokens: int) -> None:
        """Remove all but the first `tokens` positions; layers that hold fewer stay as they are."""
        for layer in self.layers:
            if type(layer) in _APPENDED and isinstance(layer, DynamicLayer):
                excess = layer.get_seq_length() - tokens
                if excess > 0:
                    layer.crop(-excess)
        self.started = min(self.started, tokens)

    def mark(self) -> CacheMark:
        """What the cache holds now; states are copied, because models change them in place."""
        return CacheMark(self.started, tuple(_state(layer) for layer in self._stateful()))

    def restore(self, mark: CacheMark) -> None:
        """Go back to what the cache held when it was marked."""
        self.truncate(mark.tokens)
        for layer, state in zip(self._stateful(), mark.states, strict=True):
            vars(layer).clear()
            # A copy again: the mark may be needed for another attempt.
            vars(layer).update(_copied(state))

    def _stateful(self) -> list[Any]:
        return [layer for layer in self.layers if type(layer) not in _APPENDED]


def _state(layer: Any) -> dict[str, Any]:
    state = vars(layer)
    if isinstance(layer, DynamicLayer):
        # These are replaced when they grow, so the old ones need no copy.
        grown = {name: state[name] for name in ("keys", "values") if name in state}
        return {**_copied({name: value for name, value in state.items() if name not in grown}), **grown}
    copied: dict[str, Any] = _copied(state)
    return copied


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(some) for key, some in value.items()}
    return [_copied(some) for some in value] if isinstance(value, list) else value
