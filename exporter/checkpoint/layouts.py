"""The ways in which checkpoints keep experts, and where each expert's matrices lie.

The authority for what is on disk is what transformers' `save_pretrained` writes (`transformers.conversion_mapping`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from exporter.checkpoint.matrices import ExpertTensors, Half, MatrixRef, matrix_ref
from exporter.checkpoint.safetensors_file import TensorRef
from exporter.errors import CheckpointError
from wire.experts import ExpertId
from wire.manifest import Architecture, Dims


class Layout(NamedTuple):
    """Names of a layer's experts, behind `model.layers.N.`.

    Attributes:
        gate, up, down: of w1, w3 and w2, as `ExpertTensors` has them. `{}` stands for the expert's index where each
            expert has tensors of its own; otherwise a tensor holds all experts of the layer. Gate and up of the same
            name lie in one tensor.
    """

    gate: str
    up: str
    down: str

    @property
    def is_fused(self) -> bool:
        """Whether a tensor holds all experts of a layer."""
        return "{}" not in self.gate


# A family's block of experts has one of these names, and its experts one of these forms.
_BLOCKS = ("block_sparse_moe", "mlp", "feed_forward")
_FORMS = (
    Layout("experts.{}.w1.weight", "experts.{}.w3.weight", "experts.{}.w2.weight"),
    Layout("experts.{}.gate_proj.weight", "experts.{}.up_proj.weight", "experts.{}.down_proj.weight"),
    Layout("experts.gate_up_proj", "experts.gate_up_proj", "experts.down_proj"),
    Layout("input_linear.weight", "input_linear.weight", "output_linear.weight"),
)
LAYOUTS = tuple(Layout(*(f"{block}.{name}" for name in form)) for block, form in product(_BLOCKS, _FORMS))
_ROUTED = re.compile(
    rf"model\.layers\.\d+\.(?:{'|'.join(_BLOCKS)})"
    r"\.(?:experts\.(?:\d+\.|gate_up_proj|down_proj)|(?:in|out)put_linear\.)"
)
FP8 = "F8_E4M3"
FP8_SCALES, MXFP4_CODES, MXFP4_SCALES, BIAS = "_scale_inv", "_blocks", "_scales", "_bias"
"""Ends of names: of FP8 values' scales, of MXFP4's codes and scales, of biases in a fused layout."""


def is_routed(name: str) -> bool:
    """Whether the tensor of this name belongs to routed experts, and not to the trunk."""
    return _ROUTED.match(name) is not None


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout of these tensors of routed experts; None if they have none of `LAYOUTS`."""
    forms = {re.sub(r"\.experts\.\d+\.", ".experts.{}.", name.split(".", 3)[-1]) for name in names}
    for layout in LAYOUTS:
        if {layout.down, layout.down + MXFP4_CODES} & forms:
            return layout
    return None


def find_experts(
    folder: Path, tensors: Mapping[str, TensorRef], dims: Dims, architecture: Architecture, *, alternating: bool
) -> dict[ExpertId, ExpertTensors]:
    """The matrices of every expert of the model.

    Args:
        folder: of the checkpoint, for messages.
        tensors: of routed experts, by name.
        alternating: in fused tensors, gate and up rows alternate; otherwise gate rows come first.

    Raises:
        CheckpointError: a tensor is missing, has another shape or a number format that can't be read.
    """
    layout = find_layout(tensors)
    if layout is None:
        raise CheckpointError(
            f"{folder} lacks the experts of its config.json under any known name, such as "
            f"'model.layers.{architecture.layers[0]}.{LAYOUTS[0].gate.format(0)}': load it with transformers and save "
            "it with save_pretrained(…)"
        )
    finder = _Finder(folder, tensors, dims, layout, biases=architecture.expert.biases, alternating=alternating)
    return {
        ExpertId(index, expert): finder.expert(f"model.layers.{layer}.", expert)
        for index, layer in enumerate(architecture.layers)
        for expert in range(dims.experts)
    }


class _Finder:
    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorRef], dims: Dims, layout: Layout, *, biases: bool,
        alternating: bool,
    ) -> None:  # fmt: skip
        self._folder, self._tensors, self._dims, self._layout = folder, tensors, dims, layout
        self._biases = biases
        self._halves: Sequence[Half] = ("even", "odd") if alternating else ("first", "second")
        if layout.gate != layout.up:
            self._halves = ("all", "all")

    def expert(self, layer: str, expert: int) -> ExpertTensors:
        """The matrices of an expert of the layer whose tensors' names begin with `layer`."""
        gate, up = self._halves
        wide, tall = (self._dims.intermediate, self._dims.hidden), (self._dims.hidden, self._dims.intermediate)
        turned = self._layout.is_fused and self._is_transposed(layer)
        parts: Sequence[tuple[str, tuple[int, int], Half]] = (
            (self._layout.gate, wide, gate),
            (self._layout.up, wide, up),
            (self._layout.down, tall, "all"),
        )
        weights = [self._matrix(layer + name, shape, expert, half, turned) for name, shape, half in parts]
        if not self._biases:
            return ExpertTensors(*weights)
        biases = [
            self._matrix(f"{layer}{name}{BIAS}", (shape[0], 1), expert, half, turned=False)
            for name, shape, half in parts
        ]
        return ExpertTensors(*weights, *biases)

    def _matrix(self, name: str, shape: tuple[int, int], expert: int, half: Half, turned: bool) -> MatrixRef:
        if not self._layout.is_fused:
            name = name.format(expert)
            ref = self._tensor(name)
            return matrix_ref(ref, shape, scales=self._tensors.get(name + FP8_SCALES))
        if name + MXFP4_CODES in self._tensors:
            codes, scales = self._tensors[name + MXFP4_CODES], self._tensor(name + MXFP4_SCALES)
            self._check_count(codes)
            return matrix_ref(codes, shape, expert=expert, half=half, scales=scales)
        ref = self._tensor(name)
        self._check_count(ref)
        return matrix_ref(ref, shape, expert=expert, half=half, transposed=turned)

    def _is_transposed(self, layer: str) -> bool:
        """Whether a layer's fused tensors are [experts, inputs, outputs]. At least one of two shapes tells."""
        hidden, inner = self._dims.hidden, self._dims.intermediate
        both, down = self._tensors.get(layer + self._layout.gate), self._tensors.get(layer + self._layout.down)
        if both is None or down is None:
            return False
        return both.shape[1:] == (hidden, 2 * inner) and down.shape[1:] == (inner, hidden)

    def _check_count(self, ref: TensorRef) -> None:
        if not ref.shape or ref.shape[0] != self._dims.experts:
            raise CheckpointError(
                f"tensor '{ref.name}' has shape {list(ref.shape)}, config.json asks for {self._dims.experts} experts"
            )

    def _tensor(self, name: str) -> TensorRef:
        ref = self._tensors.get(name)
        if ref is None:
            raise CheckpointError(f"{self._folder} lacks tensor '{name}': its files don't fit its config.json")
        return ref
