"""What the engine needs of a trunk: the part of a model that the base station computes itself."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from transformers.cache_utils import DynamicCache

from bs_coordinator.selection.routing import Routing
from bs_coordinator.trunk.inputs import SequenceInput
from wire.tensors import Array


class CacheMark(NamedTuple):
    """What a cache held at some point, for going back to it.

    Attributes:
        tokens: number of positions.
        states: of layers that can't be cut, such as recurrent ones, in a form of the trunk's own.
    """

    tokens: int
    states: tuple[Any, ...] = ()


class TrunkPass(Protocol):
    """New tokens of one or more sequences on their way through the trunk."""

    def attend(self, layer: int) -> tuple[Array, Routing]:
        """Run the model up to the experts of a layer.

        Args:
            layer: index among the layers with experts; each is called once, in order.

        Returns:
            The experts' input, float32 [tokens, hidden] on the host, and the tokens' routing.
        """

    def meanwhile(self) -> None:
        """Called once the layer's experts are asked: compute what does not depend on their answers."""
        return

    def add(self, output: Array) -> None:
        """Hand over the output of the layer's experts, float32 [tokens, hidden]."""

    def logits(self, all_logits: bool) -> list[Tensor]:
        """After the last layer: logits for each sequence, as `DistributedModel.step` returns them."""

    def abandon(self) -> None:
        """Give up the step, at any point."""
        return


class Trunk(Protocol):
    """A loaded trunk on one device. Called by one thread at a time.

    Attributes:
        config: of the model, as transformers reads it.
        layers: number of layers with experts.
        max_positions: the model's context length in tokens.
        batch_invariant: whether a token's results are bitwise independent of the tokens computed with it. If so, a
            sequence's tokens may also branch (`SequenceInput.parents`).
        packs: whether several sequences can be packed into one.
        rope_by_length: whether the rotary embedding of a token depends on how long its sequence is.
        can_truncate: whether positions can be removed from a cache. If not, a sequence can only grow: no drafts.
        continues: whether several tokens at once may follow what a cache holds. If not, a prompt takes one step.
        scored: whether every layer's routing has scores.
        pipelines: whether a sequence's next tokens may start before its earlier ones have left the last layer.
    """

    config: Any

    @property
    def layers(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def batch_invariant(self) -> bool: ...

    @property
    def packs(self) -> bool: ...

    @property
    def rope_by_length(self) -> bool: ...

    @property
    def can_truncate(self) -> bool: ...

    @property
    def continues(self) -> bool: ...

    @property
    def scored(self) -> bool: ...

    @property
    def pipelines(self) -> bool: ...

    def new_cache(self) -> DynamicCache:
        """An empty cache for one sequence."""

    def truncate(self, cache: DynamicCache, tokens: int) -> None:
        """Remove all but the first `tokens` positions; layers that hold fewer stay as they are."""

    def mark(self, cache: DynamicCache) -> CacheMark:
        """What the cache holds now. No step may be under way."""

    def restore(self, cache: DynamicCache, mark: CacheMark) -> None:
        """Bring a cache back to what it held when it was marked, after a step failed anywhere."""

    def start_pass(self, inputs: Sequence[SequenceInput]) -> TrunkPass:
        """Begin to take sequences through the trunk, in the order of `inputs`."""
