"""Linear layers whose weights are kept in int8 (a scale per output) or int4 (scale and offset per 32 inputs).

A layer is quantised when its weight is assigned, which is what loaders do, so a model is never in memory unquantised.

- On a CPU, torch's own kernels multiply. They are vectorised for bf16 only, so inputs and outputs are rounded to it.
- On a GPU, captured graphs read the codes with the trunk's own kernels (`triton_kernels`, `triton_rows`). Elsewhere
  weights are dequantised piece by piece and multiplied by cuBLAS. torch's int4 kernel is not used: both ways would need
  their own copy of the weights, because its layout suits its own kernel only.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bs_coordinator.config import TrunkQuantisation
from bs_coordinator.errors import TrunkError
from bs_coordinator.trunk.assigned_linear import AssignedLinear

GROUP = 32
"""Inputs that share scale and offset in int4."""
BITS: dict[TrunkQuantisation, int] = {"int8": 8, "int4": 4}
_MULTIPLE = {8: 16, 4: GROUP}
"""Of what a layer's inputs must be a multiple: torch's int8 kernel reads 16 at a time, and beyond the end otherwise."""

_KEPT = frozenset({"gate", "router", "wg", "shared_expert_gate", "dt_proj"})
"""Names of modules in which nothing is quantised: those that choose or weigh experts, and Jamba's time steps."""
_PIECE = 1 << 24
"""Weights that are quantised or dequantised at once: bounds the memory that this takes."""
_ROW_BLOCK = 64
"""torch packs int4 weights for CPUs by blocks of at most so many outputs, and takes multiples of 16."""


class Codes(NamedTuple):
    """A quantised matrix [outputs, inputs].

    Attributes:
        codes: int8 [outputs, inputs], or for int4 uint8 from 0 to 15.
        scales: [outputs]; for int4 scale and offset of each group, [outputs, groups, 2].
    """

    codes: Tensor
    scales: Tensor


def quantise(weight: Tensor, bits: int, dtype: torch.dtype) -> Codes:
    """Round a matrix to the nearest codes.

    int8 is symmetric: code · scale. int4 spans each group's range: (code - 8) · scale + offset.

    Args:
        weight: [outputs, inputs]; for int4 the inputs are a multiple of `GROUP`.
        bits: 8 or 4.
        dtype: of the scales. Codes are chosen for scales that are rounded already.
    """
    pieces = [_quantise_piece(piece, bits, dtype) for piece in torch.split(weight, _rows_at_once(weight))]
    return Codes(torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scales for piece in pieces]))


def _quantise_piece(weight: Tensor, bits: int, dtype: torch.dtype) -> Codes:
    weight = weight.float()
    if bits == 8:
        scales = _not_zero((weight.abs().amax(dim=1) / 127).to(dtype))
        codes = (weight / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return Codes(codes, scales)
    grouped = weight.view(len(weight), -1, GROUP)
    low, high = grouped.aminmax(dim=2)
    scales = _not_zero(((high - low) / 15).to(dtype))
    offsets = (low + 8 * scales.float()).to(dtype)
    exact = (grouped - offsets.float()[..., None]) / scales.float()[..., None]
    codes = exact.round_().add_(8).clamp_(0, 15).to(torch.uint8)
    return Codes(codes.view(weight.shape), torch.stack([scales, offsets], dim=2))


def _rows_at_once(matrix: Tensor) -> int:
    return max(1, _PIECE // matrix.shape[1])


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def dequantise(codes: Codes) -> Tensor:
    """The matrix that the codes stand for, in the scales' dtype."""
    if codes.codes.dtype == torch.int8:
        return codes.codes * codes.scales[:, None]
    scales, offsets = codes.scales.unbind(dim=2)
    grouped = codes.codes.view(*scales.shape, GROUP).to(scales.dtype) - 8
    return (grouped * scales[..., None] + offsets[..., None]).view(codes.codes.shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, [outputs, inputs], two per byte: byte j of a group of 32 holds codes j (low) and j + 16."""
    low, high = codes.view(len(codes), -1, 2, GROUP // 2).unbind(dim=2)
    return (low | high << 4).view(len(codes), -1)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    grouped = packed.view(len(packed), -1, 1, GROUP // 2)
    return torch.cat([grouped & 15, grouped >> 4], dim=2).view(len(packed), -1)


def by_torch(device: torch.device) -> bool:
    """Whether torch's kernels multiply on a device, and its codes are in their order."""
    return device.type == "cpu"


class QuantisedLinear(AssignedLinear):
    """A linear layer that keeps codes instead of its weight.

    Attributes:
        bits: 8 or 4.
        codes, scales: as `Codes`; on a GPU two int4 codes per byte (`pack_nibbles`), on a CPU in torch's own order.
    """

    def __init__(self, like: nn.Linear, bits: int) -> None:
        """A layer whose weight is assigned later.

        Args:
            like: gives shape, dtype and bias.
            bits: 8 or 4.
        """
        super().__init__(like)
        self.bits = bits
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)

    def _take(self, weight: Tensor) -> None:
        on_cpu = by_torch(weight.device)
        codes, scales = quantise(weight, self.bits, torch.bfloat16 if on_cpu else weight.dtype)
        if self.bits == 4:
            codes = _packed_for_cpu(codes) if on_cpu else pack_nibbles(codes)
            scales = _scales_for_cpu(scales) if on_cpu else scales
        self.codes, self.scales = codes, scales

    def forward(self, x: Tensor) -> Tensor:
        """x · weightᵀ + bias, in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        product = self._on_cpu(flat) if by_torch(x.device) else self._by_pieces(flat)
        product = product.view(*x.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def _on_cpu(self, x: Tensor) -> Tensor:
        wide = x.to(torch.bfloat16).contiguous()
        if not len(wide):
            return x.new_empty(0, self.out_features)
        if self.bits == 8:
            product = torch.ops.aten._weight_int8pack_mm(wide, self.codes, self.scales)
        else:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(wide, self.codes, GROUP, self.scales)
        result: Tensor = product[:, : self.out_features].to(x.dtype)
        return result

    def _by_pieces(self, x: Tensor) -> Tensor:
        at_once = max(1, _PIECE // self.in_features)
        pieces = []
        for codes, scales in zip(
            torch.split(self.codes, at_once), torch.split(self.scales, at_once), strict=True
        ):  # fmt: skip
            whole = unpack_nibbles(codes) if self.bits == 4 else codes
            pieces.append(functional.linear(x, dequantise(Codes(whole, scales)).to(x.dtype)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _packed_for_cpu(codes: Tensor) -> Tensor:
    padded = functional.pad(codes, (0, 0, 0, -len(codes) % 16))
    at_once = max(_ROW_BLOCK, _rows_at_once(codes) // _ROW_BLOCK * _ROW_BLOCK)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return torch.cat([pack(piece.to(torch.int32), 1) for piece in torch.split(padded, at_once)])


def _scales_for_cpu(scales: Tensor) -> Tensor:
    padded = functional.pad(scales, (0, 0, 0, 0, 0, -len(scales) % 16))
    return padded.transpose(0, 1).contiguous()


def quantise_linears(model: nn.Module, quantisation: TrunkQuantisation) -> None:
    """Replace a model's linear layers, which have no weights yet, by ones that will keep codes.

    Routers stay as they are: they are small, and decide which experts are asked. So do layers of whose weights a model
    makes its own use.

    Raises:
        TrunkError: the kernels can't multiply as many inputs as some layer has.
    """
    if quantisation == "none":
        return
    bits = BITS[quantisation]
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or not _KEPT.isdisjoint(name.split(".")):
            continue
        if module.in_features % _MULTIPLE[bits]:
            raise TrunkError(
                f"--trunk-quantisation {quantisation}: {name} has {module.in_features} inputs, which is not a multiple "
                f"of {_MULTIPLE[bits]}; use {'none' if module.in_features % _MULTIPLE[8] else 'int8'}"
            )
        model.set_submodule(name, QuantisedLinear(module, bits))
