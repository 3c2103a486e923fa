"""A bundle's experts in torch, for evaluations on a GPU: the stored weights, with activations in float32.

Nodes round activations to int8 per block before each product (`accuracy_level` 4 of MatMulNBits). Here they are not
rounded, so outputs differ by that rounding, and nothing else.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.errors import WdmoeError
from exporter.expert.encoders import BITS
from exporter.expert.expert import slice_bounds
from exporter.expert.graph import MATRICES, Layout, matrix_shape, plan_layout
from wire.experts import UnitId
from wire.manifest import ExpertEntry, ExpertGraph, Manifest, Quantisation, verify_file
from wire.tensors import Array

_TYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float16): torch.float16, np.dtype(np.float32): torch.float32}


class TorchRuntime:
    """All experts of one bundle on one device, unpacked to float32."""

    def __init__(self, bundle: Path, manifest: Manifest, device: str) -> None:
        """Verify and load all experts.

        Args:
            bundle: folder of the bundle.
            device: of torch, such as `cuda` or `cpu`.

        Raises:
            BundleError: a file is missing or changed.
            WdmoeError: there is no such device, or the quantisation is not made of weights alone.
        """
        quantisation = manifest.quantisation
        if quantisation.scheme == "int8-dynamic" or quantisation.backend != "direct":
            raise WdmoeError(f"experts in {quantisation} can't be computed by torch: evaluate them without --gpu")
        check_device(device)
        self._device = torch.device(device)
        self._graph = manifest.architecture.expert
        self._experts = {entry.id: self._load(bundle, manifest, entry) for entry in manifest.experts}

    def run(self, id: UnitId, x: Array) -> Array:
        """The expert's output, float32 [tokens, hidden], for `x` of the same shape."""
        w1, w3, w2 = self._experts[id]
        with torch.inference_mode():
            rows = torch.from_numpy(np.ascontiguousarray(x)).to(self._device)
            y = w2(_gated(self._graph, w1(rows), w3(rows)))
            output: Array = y.cpu().numpy()
        return output

    def _load(self, bundle: Path, manifest: Manifest, entry: ExpertEntry) -> list[Callable[[Tensor], Tensor]]:
        """The three products of an expert, in the order w1, w3, w2."""
        first, stop = slice_bounds(manifest.dims.intermediate, manifest.quantisation, entry.slices)[entry.slice]
        dims = msgspec.structs.replace(manifest.dims, intermediate=stop - first)
        layout = plan_layout(dims, manifest.quantisation, self._graph)
        weights = entry.files[1]
        verify_file(bundle, weights)
        stored = torch.from_numpy(np.fromfile(bundle / weights.path, np.uint8)).to(self._device)
        of = manifest.quantisation.of_matrix
        return [_product(stored, layout, m, matrix_shape(dims, m)[1], of(m)) for m in MATRICES]


def check_device(device: str | None) -> None:
    """Check that torch can use a device, before anything is loaded.

    Raises:
        WdmoeError: it is a GPU, and there is none.
    """
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        raise WdmoeError("--gpu: torch finds no CUDA device here; without --gpu, onnxruntime computes the experts")


def _product(
    stored: Tensor, layout: Layout, matrix: str, columns: int, quantisation: Quantisation
) -> Callable[[Tensor], Tensor]:
    """The product with one matrix of a weights file, and its bias if there is one.

    Args:
        stored: uint8 [bytes of the file].
        columns: inputs of the matrix.
    """
    parts = {
        placed.part.suffix: stored[placed.offset : placed.offset + placed.part.bytes]
        .view(_TYPES[placed.part.dtype.newbyteorder("=")])
        .view(placed.part.shape)
        for placed in layout.parts[matrix]
    }
    weight = parts["weight"]
    weight = unpack(weight, parts, quantisation)[:, :columns] if quantisation.block else weight.to(torch.float32)
    weight, bias = weight.contiguous(), parts.get("bias")
    return lambda x: functional.linear(x, weight, bias)


def unpack(weight: Tensor, parts: dict[str, Tensor], quantisation: Quantisation) -> Tensor:
    """Values of blockwise codes, float32 [rows, blocks · block]: (code - zero point) · scale, as in MatMulNBits.

    Args:
        weight: uint8 [rows, blocks, bytes of a block].
        parts: `scales`, float32 [rows · blocks], and `zero_points`, packed uint8, unless symmetric.
    """
    bits = BITS[quantisation.scheme]
    rows, blocks, _ = weight.shape
    zero: Tensor | float = float(2 ** (bits - 1))
    if not quantisation.symmetric:
        zero = _codes(parts["zero_points"].view(rows, -1), bits)[:, :blocks, None].to(torch.float32)
    values = (_codes(weight, bits).to(torch.float32) - zero) * parts["scales"].view(rows, blocks, 1)
    return values.view(rows, -1)


def _codes(packed: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., n]; two of 4 bits share a byte, the even one low."""
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _gated(graph: ExpertGraph, gate: Tensor, up: Tensor) -> Tensor:
    """The input of w2, float32 [tokens, intermediate] (`wire.manifest.ExpertGraph`)."""
    match graph.activation:
        case "silu":
            return functional.silu(gate) * up
        case "gelu":
            return functional.gelu(gate) * up
        case "gelu-tanh":
            return functional.gelu(gate, approximate="tanh") * up
        case "clamped":
            alpha, limit = graph.alpha or 0.0, graph.limit or 0.0
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return gate * torch.sigmoid(alpha * gate) * (up + 1)
