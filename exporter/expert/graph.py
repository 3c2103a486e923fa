"""The ONNX graph of one expert (`wire.manifest.ExpertGraph`), x and y float32 [tokens, hidden].

Built node by node, without tracing, and with the same bytes on every run. Weights are external data in one file beside
the graph, every tensor at a multiple of `ALIGNMENT`, so that runtimes can map it.

How each scheme multiplies:

    int4, int8     com.microsoft MatMulNBits, accuracy level 4 (activations to int8 per block); with `w2_bits`, w2 has
                   8 bits beside w1 and w3 with 4
    int8-dynamic   DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which onnxruntime fuses
    fp32           Gemm with the weights transposed, so that they keep the checkpoint's layout
    fp16           the same behind a Cast: fp16 on disk, computed in fp32

int8-dynamic stores signed weights, which cost nothing on the Arm processors without dot product that the scheme is for.
Unsigned weights took 1.1 times as long at one row and 2.3 times at 128 rows on an x86 core with VNNI. On x86 without
VNNI, onnxruntime converts them (`wire.manifest.EXACT_SUMS`).

Biases are fp32 in every scheme. Activations are built from operators of opset 17, which has no Gelu; onnxruntime fuses
them.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporter.expert.encoders import BITS, StoredPart, matrix_parts
from wire.manifest import Dims, ExpertGraph, Quantisation

# The smallest page size of all platforms: tensors that start on a page are mapped without copying.
ALIGNMENT = 4096
# Old enough for the onnxruntime of Jetson images, new enough for all operators used here.
OPSET = 17
IR_VERSION = 8
# Quantises activations to int8 per block; lower levels are several times slower at one token.
ACCURACY_LEVEL = 4

MATRICES = ("w1", "w3", "w2")
SILU = ExpertGraph()

PROTO_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
}


@dataclass(frozen=True)
class Placed:
    """A stored tensor and its place in the weights file."""

    part: StoredPart
    offset: int


@dataclass(frozen=True)
class Layout:
    """Layout of one expert's weights file.

    Attributes:
        parts: stored tensors by matrix (`w1`, `w3`, `w2`), in file order.
        bytes: size of the file.
    """

    parts: dict[str, tuple[Placed, ...]]
    bytes: int


def matrix_shape(dims: Dims, matrix: str) -> tuple[int, int]:
    """[outputs, inputs] of `w1`, `w3` or `w2`."""
    return (dims.hidden, dims.intermediate) if matrix == "w2" else (dims.intermediate, dims.hidden)


def plan_layout(dims: Dims, quantisation: Quantisation, expert: ExpertGraph = SILU) -> Layout:
    """The layout of an expert's weights file, the same for all experts of a bundle; a matrix's bias comes last."""
    parts: dict[str, tuple[Placed, ...]] = {}
    end = 0
    for matrix in MATRICES:
        placed = []
        rows, columns = matrix_shape(dims, matrix)
        stored = matrix_parts(quantisation.of_matrix(matrix), rows, columns)
        if expert.biases:
            stored += (StoredPart("bias", np.dtype(np.float32), (rows,)),)
        for part in stored:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            placed.append(Placed(part, offset))
            end = offset + part.bytes
        parts[matrix] = tuple(placed)
    return Layout(parts, end)


def build_graph(
    dims: Dims, quantisation: Quantisation, layout: Layout, weights_name: str, expert: ExpertGraph = SILU
) -> bytes:
    """The serialised graph; its weights are in the file `weights_name` in the same folder."""
    build = _Builder(quantisation, layout, weights_name, biases=expert.biases)
    gate = build.matmul("x", "w1", dims)
    up = build.matmul("x", "w3", dims)
    match expert.activation:
        case "silu":
            build.node("Sigmoid", [gate], "gate_sigmoid")
            build.node("Mul", [gate, "gate_sigmoid"], "gate_silu")
            build.node("Mul", ["gate_silu", up], "inner")
        case "gelu":
            _gelu(build, gate)
            build.node("Mul", ["gate_gelu", up], "inner")
        case "gelu-tanh":
            _gelu_tanh(build, gate)
            build.node("Mul", ["gate_gelu", up], "inner")
        case "clamped":
            _clamped(build, gate, up, expert)
    build.matmul("inner", "w2", dims, output="y")
    graph = helper.make_graph(
        build.nodes,
        "expert",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", dims.hidden])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", dims.hidden])],
        build.initializers,
    )
    return model_bytes(graph)


def _gelu(build: "_Builder", gate: str) -> None:
    """x · (1 + erf(x / √2)) / 2, in the order that onnxruntime fuses."""
    build.node("Div", [gate, build.constant("sqrt2", math.sqrt(2))], "gate_scaled")
    build.node("Erf", ["gate_scaled"], "gate_erf")
    build.node("Add", ["gate_erf", build.constant("one", 1)], "gate_shifted")
    build.node("Mul", [gate, "gate_shifted"], "gate_doubled")
    build.node("Mul", ["gate_doubled", build.constant("half", 0.5)], "gate_gelu")


def _gelu_tanh(build: "_Builder", gate: str) -> None:
    """x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2 (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    build.node("Mul", [gate, gate], "gate_squared")
    build.node("Mul", ["gate_squared", build.constant("cubic", math.sqrt(2 / math.pi) * 0.044715)], "gate_cubic")
    build.node("Add", ["gate_cubic", build.constant("linear", math.sqrt(2 / math.pi))], "gate_slope")
    build.node("Mul", [gate, "gate_slope"], "gate_scaled")
    build.node("Tanh", ["gate_scaled"], "gate_tanh")
    build.node("Add", ["gate_tanh", build.constant("one", 1)], "gate_shifted")
    build.node("Mul", [gate, "gate_shifted"], "gate_doubled")
    build.node("Mul", ["gate_doubled", build.constant("half", 0.5)], "gate_gelu")


def _clamped(build: "_Builder", gate: str, up: str, expert: ExpertGraph) -> None:
    """gpt-oss: g · sigmoid(alpha · g) · (u + 1) with g = min(gate, limit), u = clamp(up, ±limit)."""
    positive = expert.limit or 0.0
    limit = build.constant("limit", positive)
    build.node("Clip", [gate, "", limit], "gate_clamped")
    build.node("Mul", ["gate_clamped", build.constant("alpha", expert.alpha or 0.0)], "gate_scaled")
    build.node("Sigmoid", ["gate_scaled"], "gate_sigmoid")
    build.node("Mul", ["gate_clamped", "gate_sigmoid"], "gate_glu")
    build.node("Clip", [up, build.constant("negative_limit", -positive), limit], "up_clamped")
    build.node("Add", ["up_clamped", build.constant("one", 1)], "up_shifted")
    build.node("Mul", ["gate_glu", "up_shifted"], "inner")


def model_bytes(graph: onnx.GraphProto) -> bytes:
    """A serialised model of one graph, the same bytes for the same graph."""
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="wdmoe")
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


class _Builder:
    def __init__(self, quantisation: Quantisation, layout: Layout, weights_name: str, *, biases: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._quantisation, self._biases = quantisation, biases
        self._quantised: dict[str, tuple[str, str, str]] = {}
        for matrix, placed in layout.parts.items():
            self.initializers += [external(f"{matrix}.{p.part.suffix}", p, weights_name) for p in placed]

    def node(self, op: str, inputs: list[str], *outputs: str, domain: str = "", **attributes: int) -> None:
        name = outputs[0]
        self.nodes.append(helper.make_node(op, inputs, list(outputs), name=name, domain=domain, **attributes))

    def constant(self, name: str, value: float) -> str:
        """Add a scalar; returns its name."""
        self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def matmul(self, x: str, matrix: str, dims: Dims, *, output: str | None = None) -> str:
        """Add x · matrixᵀ, plus its bias if there are biases; returns the name of the result."""
        output = output or f"{matrix}.out"
        if self._biases and self._quantisation.scheme not in ("fp16", "fp32"):
            # MatMulNBits takes a bias only in newer versions of onnxruntime than Jetson images have.
            self._matmul(x, matrix, dims, f"{matrix}.product")
            self.node("Add", [f"{matrix}.product", f"{matrix}.bias"], output)
        else:
            self._matmul(x, matrix, dims, output)
        return output

    def _matmul(self, x: str, matrix: str, dims: Dims, output: str) -> None:
        scheme = self._quantisation.of_matrix(matrix).scheme
        if scheme in ("int4", "int8"):
            self._block_matmul(x, matrix, output, *matrix_shape(dims, matrix))
        elif scheme == "int8-dynamic":
            self._integer_matmul(x, matrix, output)
        else:
            weight = f"{matrix}.weight"
            if scheme == "fp16":
                self.node("Cast", [weight], f"{matrix}.fp32", to=TensorProto.FLOAT)
                weight = f"{matrix}.fp32"
            self.node("Gemm", [x, weight, *([f"{matrix}.bias"] if self._biases else [])], output, transB=1)

    def _block_matmul(self, x: str, matrix: str, output: str, outputs: int, inputs: int) -> None:
        names = [x, f"{matrix}.weight", f"{matrix}.scales"]
        if not self._quantisation.symmetric:
            names.append(f"{matrix}.zero_points")
        self.node(
            "MatMulNBits",
            names,
            output,
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=BITS[self._quantisation.of_matrix(matrix).scheme],
            block_size=self._quantisation.block,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _integer_matmul(self, x: str, matrix: str, output: str) -> None:
        if x not in self._quantised:
            names = (f"{x}.quantised", f"{x}.scale", f"{x}.zero_point")
            self.node("DynamicQuantizeLinear", [x], *names)
            self._quantised[x] = names
        quantised, scale, zero = self._quantised[x]
        self.node("MatMulInteger", [quantised, f"{matrix}.weight", zero], f"{matrix}.int32")
        self.node("Cast", [f"{matrix}.int32"], f"{matrix}.float", to=TensorProto.FLOAT)
        self.node("Mul", [scale, f"{matrix}.scales"], f"{matrix}.scale")
        self.node("Mul", [f"{matrix}.float", f"{matrix}.scale"], output)


def external(name: str, placed: Placed, weights_name: str) -> onnx.TensorProto:
    tensor = TensorProto()
    tensor.name = name
    tensor.data_type = PROTO_TYPES[placed.part.dtype]
    tensor.dims.extend(placed.part.shape)
    tensor.data_location = TensorProto.EXTERNAL
    facts = {"location": weights_name, "offset": placed.offset, "length": placed.part.bytes}
    for key, value in facts.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return tensor
