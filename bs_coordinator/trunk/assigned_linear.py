"""Linear layers that keep something else than the weight that they are assigned, which is what loaders do."""

from typing import Any

from torch import Tensor, nn


class AssignedLinear(nn.Linear):
    """A linear layer without a weight: `_take` keeps what is made of it."""

    def __init__(self, like: nn.Linear) -> None:
        """A layer whose weight is assigned later.

        Args:
            like: gives shape, dtype and bias.
        """
        # Not nn.Linear's, which would make a weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.register_parameter("weight", nn.Parameter(like.weight.to("meta"), requires_grad=False))
        self.register_parameter("bias", like.bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and not value.is_meta:
            self._take(value.detach())
            self._parameters.pop("weight", None)
        else:
            super().__setattr__(name, value)

    def _take(self, weight: Tensor) -> None:
        """Keep what `forward` needs of a weight [outputs, inputs]."""
        raise NotImplementedError
