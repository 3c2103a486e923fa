"""Linear layers in fp32 on a CPU whose weights are kept in the order in which oneDNN's kernels read them.

For a few rows they take a third to two thirds of the time of torch's own product (MKL's), and a row's result does not
depend on how many rows there are, from two rows on. Both hold on processors with AVX2 and with AVX-512;
`rows.rows_are_independent` tries the second one out.

torch has these kernels for models that it compiles, under names that are not public (seen in 2.11 and 2.13). Without
them the layers stay as they are.
"""

import torch
from torch import Tensor, nn

from bs_coordinator.trunk.assigned_linear import AssignedLinear

_ROWS = 8
"""Rows that the order of the weights is chosen for."""


def available() -> bool:
    """Whether this torch has the kernels, and they work on this processor."""
    weight, x = torch.eye(16), torch.ones(2, 16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):  # not there, or not for this processor
        return False
    return torch.equal(product, x)


class PackedLinear(AssignedLinear):
    """A linear layer that keeps its weight in oneDNN's order.

    Attributes:
        packed: the weight, an opaque tensor [outputs, inputs].
    """

    def __init__(self, like: nn.Linear) -> None:
        """A layer whose weight is assigned later; `like` gives shape and bias."""
        super().__init__(like)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self.register_buffer("packed", None, persistent=False)

    def _take(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x · weightᵀ + bias."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """The same for [rows, inputs], without the microseconds that calling a module takes."""
        if len(x) == 1:  # a single row has a kernel of its own, which adds up in another order
            pair: Tensor = self._multiply(torch.cat((x, x)), self.packed, self.bias, "none", [], "")
            return pair[:1]
        product: Tensor = self._multiply(x, self.packed, self.bias, "none", [], "")
        return product

    def unpacked(self) -> nn.Linear:
        """An ordinary layer with the same weight."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=False)
        plain.weight = nn.Parameter(self.packed.to_dense(), requires_grad=False)
        plain.bias = self.bias
        return plain


def pack_linears(model: nn.Module) -> None:
    """Replace a model's linear layers, which have no weights yet, by ones that will keep them packed."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, PackedLinear(module))


def unpack_linears(model: nn.Module) -> None:
    """Replace a model's packed layers by ordinary ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            model.set_submodule(name, module.unpacked())
