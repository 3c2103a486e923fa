"""Where the matrices of an expert lie in a checkpoint's tensors, which hold one expert or all experts of a layer."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from exporter.checkpoint.safetensors_file import ITEM_BYTES, TensorRef
from exporter.errors import CheckpointError

FLOAT_DTYPES = ("BF16", "F16", "F32")
MXFP4_BLOCK = 32
"""Weights of a row that share an exponent in MXFP4 (OCP Microscaling Formats 1.0, section 5.2)."""
FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale in DeepSeek's FP8 checkpoints."""

Half = Literal["all", "first", "second", "even", "odd"]
"""Which of a tensor's output rows make a matrix: gate and up projections may be one after the other, or alternate."""


@dataclass(frozen=True)
class MatrixRef:
    """The place of one matrix [rows, columns] = [outputs, inputs].

    Attributes:
        tensor: holds the matrix, perhaps among others; with `scales`, its codes.
        shape: rows and columns.
        offset: byte of the tensor with which this expert's part begins.
        outputs: output rows of this expert in the tensor, other matrices' included.
        first, step: this matrix has the rows first, first + step, ….
        transposed: whether the tensor is [inputs, outputs].
        scales: exponents (U8) of MXFP4 codes, or scales of FP8 values.
        scale_block: rows and columns that share a scale.
        columns: first and last + 1 of the columns that are wanted, out of those of `shape`, which are all read.
    """

    tensor: TensorRef
    shape: tuple[int, int]
    offset: int
    outputs: int
    first: int
    step: int
    transposed: bool
    scales: TensorRef | None
    scale_block: tuple[int, int]
    columns: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.tensor.name

    @property
    def is_mxfp4(self) -> bool:
        """Whether two 4-bit values share a byte."""
        return self.scales is not None and self.tensor.dtype == "U8"

    @property
    def dtype(self) -> str:
        """Number format as safetensors writes it, or `MXFP4`."""
        return "MXFP4" if self.is_mxfp4 else self.tensor.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's values in the tensor."""
        return self.shape[1] // 2 if self.is_mxfp4 else self.shape[1] * ITEM_BYTES[self.tensor.dtype]

    @property
    def bytes(self) -> int:
        """Bytes of the matrix in the checkpoint, with its scales."""
        rows, columns = self.shape
        scales = 0
        if self.scales is not None:
            high, wide = self.scale_block
            scales = -(-rows // high) * -(-columns // wide) * ITEM_BYTES[self.scales.dtype]
        return rows * self.row_bytes + scales

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """The checkpoint's tensors that are read for this matrix."""
        return (self.tensor,) if self.scales is None else (self.tensor, self.scales)


class ExpertTensors(NamedTuple):
    """The matrices of one expert; `wire.manifest.ExpertGraph` says what it computes with them.

    w1 (gate) and w3 (up) are [intermediate, hidden], w2 (down) is [hidden, intermediate]. Biases are matrices of one
    column.
    """

    w1: MatrixRef
    w3: MatrixRef
    w2: MatrixRef
    b1: MatrixRef | None = None
    b3: MatrixRef | None = None
    b2: MatrixRef | None = None

    @property
    def matrices(self) -> tuple[MatrixRef, ...]:
        """All that there are, in the order in which `ExpertEntry.source_sha256` hashes them: each before its bias."""
        ordered = (self.w1, self.b1, self.w3, self.b3, self.w2, self.b2)
        return tuple(matrix for matrix in ordered if matrix is not None)

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """The checkpoint's tensors in which they lie, each once."""
        return tuple(dict.fromkeys(tensor for matrix in self.matrices for tensor in matrix.tensors))

    @property
    def bytes(self) -> int:
        """Bytes of this expert in the checkpoint."""
        return sum(matrix.bytes for matrix in self.matrices)

    def inner(self, first: int, stop: int) -> "ExpertTensors":
        """A smaller expert with the inner neurons from `first` to before `stop`.

        Such experts add up to this one if each neuron is in one of them, because w2 only sums over neurons. The bias of
        w2 is in the one that begins with neuron 0.
        """

        def rows(matrix: MatrixRef) -> MatrixRef:
            return replace(
                matrix, shape=(stop - first, matrix.shape[1]), first=matrix.first + first * matrix.step
            )  # fmt: skip

        return ExpertTensors(
            rows(self.w1),
            rows(self.w3),
            replace(self.w2, columns=(first, stop)),
            self.b1 and rows(self.b1),
            self.b3 and rows(self.b3),
            self.b2 if first == 0 else None,
        )


def matrix_ref(
    tensor: TensorRef,
    shape: tuple[int, int],
    *,
    expert: int | None = None,
    half: Half = "all",
    transposed: bool = False,
    scales: TensorRef | None = None,
    scale_block: tuple[int, int] = FP8_BLOCK,
) -> MatrixRef:
    """The matrix of this shape in a tensor, after a check of the tensor's shape and number format.

    Args:
        shape: rows and columns, as in `ExpertTensors`.
        expert: index along the first axis of a tensor that holds all experts of a layer; None if it holds one.
        half: which of the output rows.
        transposed: the tensor is [inputs, outputs].
        scales: of MXFP4, U8 [outputs, inputs / 32], where the tensor is U8 [outputs, inputs / 32, 16]; or of FP8, a
            floating-point tensor [⌈outputs / high⌉, ⌈inputs / wide⌉] where the tensor is F8_E4M3.
        scale_block: high and wide.

    Raises:
        CheckpointError: the tensor has another shape, or a number format that can't be read.
    """
    rows, columns = shape
    outputs = rows if half == "all" else 2 * rows
    mxfp4 = scales is not None and tensor.dtype == "U8"
    if mxfp4:
        scale_block = (1, MXFP4_BLOCK)
    _check_dtypes(tensor, scales, mxfp4=mxfp4)
    if mxfp4 and (columns % MXFP4_BLOCK or transposed):
        raise CheckpointError(
            f"tensor '{tensor.name}' is MXFP4, which needs rows of a multiple of {MXFP4_BLOCK} inputs"
        )
    if scales is not None and not mxfp4 and (expert is not None or half != "all" or transposed):
        raise CheckpointError(f"tensor '{tensor.name}' is FP8 and holds several experts: only single ones can be read")
    if columns == 1:
        wanted: tuple[int, ...] = (outputs,)
    elif mxfp4:
        wanted = (outputs, columns // MXFP4_BLOCK, MXFP4_BLOCK // 2)
    else:
        wanted = (columns, outputs) if transposed else (outputs, columns)
    _check_shape(tensor, wanted, expert)
    if scales is not None:
        high, wide = scale_block
        _check_shape(scales, (-(-outputs // high), -(-columns // wide)), expert)
    experts = 1 if expert is None else tensor.shape[0]
    first = {"all": 0, "first": 0, "second": rows, "even": 0, "odd": 1}[half]
    return MatrixRef(
        tensor, shape, offset=tensor.bytes // experts * (expert or 0), outputs=outputs, first=first,
        step=2 if half in ("even", "odd") else 1, transposed=transposed and columns > 1, scales=scales,
        scale_block=scale_block,
    )  # fmt: skip


def _check_dtypes(tensor: TensorRef, scales: TensorRef | None, *, mxfp4: bool) -> None:
    if scales is None:
        right = tensor.dtype in FLOAT_DTYPES
    else:
        right = scales.dtype == "U8" if mxfp4 else tensor.dtype == "F8_E4M3" and scales.dtype in FLOAT_DTYPES
    if not right:
        found = tensor.dtype + (f" with scales in {scales.dtype}" if scales else "")
        raise CheckpointError(
            f"tensor '{tensor.name}' is {found}: only {', '.join(FLOAT_DTYPES)}, MXFP4 and FP8 with block scales "
            "can be exported"
        )


def _check_shape(tensor: TensorRef, wanted: tuple[int, ...], expert: int | None) -> None:
    found = tensor.shape if expert is None else tensor.shape[1:]
    if found != wanted or (expert is not None and expert >= tensor.shape[0]):
        shown = ", ".join(map(str, wanted if expert is None else ("experts", *wanted)))
        raise CheckpointError(f"tensor '{tensor.name}' has shape {list(tensor.shape)}, config.json asks for [{shown}]")
