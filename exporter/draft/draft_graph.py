"""The ONNX graph of a dense Llama as draft model: token ids in, the most probable next token out.

The same graph serves prompts and single tokens. The caller keeps keys and values in buffers that are bound both as
past and as present; with a shorter length, the graph ignores later entries.

    inputs   ids int64 [1, tokens], length int32 [1] (tokens in all, less one), total int32 [] (tokens in all),
             keys.N and values.N float32 [1, key-value heads, capacity, head's size]
    outputs  id int64 [1] (after the last token), probability float32 [1] (of that token), new_keys.N, new_values.N,
             next_ids int64 [1, CHOICES], next_probabilities float32 [1, CHOICES] (the most probable ones, best first)
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.helper import make_tensor_value_info as value_info

from exporter.demo_model.base import DenseShape
from exporter.expert.encoders import BITS, StoredPart, matrix_parts
from exporter.expert.graph import ACCURACY_LEVEL, ALIGNMENT, Placed, external, model_bytes
from wire.manifest import Quantisation

QUANTISATION = Quantisation(scheme="int8", block=32)
"""Of the next tokens of the demo model, its base names 87 % with these codes, 87 % in fp32, and 78 % as int4."""

CHOICES = 4
"""Most probable next tokens that the graph names: what may come where a draft turns out to be wrong."""


@dataclass(frozen=True)
class Matrix:
    """A weight of the graph: one or several of the model's tensors, stacked by rows.

    Attributes:
        sources: names of the model's tensors.
        parts: its stored tensors.
    """

    sources: tuple[str, ...]
    rows: int
    columns: int
    parts: tuple[Placed, ...]


@dataclass(frozen=True)
class DraftLayout:
    """Layout of the weights file.

    Attributes:
        matrices: weights by name in the graph, in file order; factors of matrix products are quantised.
        bytes: size of the file.
    """

    matrices: dict[str, Matrix]
    bytes: int


def plan_draft(shape: DenseShape) -> DraftLayout:
    """The layout of the weights of a model."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    embedding = "model.embed_tokens.weight"
    head = embedding if shape.tied_embeddings else "lm_head.weight"
    matrices: dict[str, Matrix] = {}
    end = 0

    def place(name: str, sources: tuple[str, ...], rows: int, columns: int, parts: tuple[StoredPart, ...]) -> None:
        nonlocal end
        placed = []
        for part in parts:
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            placed.append(Placed(part, offset))
            end = offset + part.bytes
        matrices[name] = Matrix(sources, rows, columns, tuple(placed))

    def quantised(name: str, sources: tuple[str, ...], rows: int, columns: int) -> None:
        place(name, sources, rows, columns, matrix_parts(QUANTISATION, rows, columns))

    def norm(name: str, source: str) -> None:
        place(name, (source,), 1, hidden, (StoredPart("weight", np.dtype("<f4"), (hidden,)),))

    table = (shape.vocab_size, hidden)
    place("embedding", (embedding,), *table, (StoredPart("weight", np.dtype("<f2"), table),))
    for layer in range(shape.layers):
        at, model = f"{layer}", f"model.layers.{layer}"
        attention = tuple(f"{model}.self_attn.{p}_proj.weight" for p in "qkv")
        norm(f"{at}.norm1", f"{model}.input_layernorm.weight")
        quantised(f"{at}.qkv", attention, queries + 2 * keys, hidden)
        quantised(f"{at}.out", (f"{model}.self_attn.o_proj.weight",), hidden, queries)
        norm(f"{at}.norm2", f"{model}.post_attention_layernorm.weight")
        quantised(f"{at}.gate", (f"{model}.mlp.gate_proj.weight",), inner, hidden)
        quantised(f"{at}.up", (f"{model}.mlp.up_proj.weight",), inner, hidden)
        quantised(f"{at}.down", (f"{model}.mlp.down_proj.weight",), hidden, inner)
    norm("norm", "model.norm.weight")
    quantised("head", (head,), *table)
    return DraftLayout(matrices, end)


def build_draft(shape: DenseShape, layout: DraftLayout, weights_name: str) -> bytes:
    """The serialised graph; its weights are in the file `weights_name` in the same folder."""
    build = _Builder(shape, layout, weights_name)
    build.node("Gather", ["embedding.weight", "ids"], "embedded.fp16")
    build.node("Cast", ["embedded.fp16"], "embedded", to=TensorProto.FLOAT)
    build.normed("embedded", "0.norm1")
    for layer in range(shape.layers):
        build.attention(layer)
        build.feed_forward(layer)
    build.node("Gather", ["norm.y", build.constant("last", np.array(-1, np.int64))], "final", axis=1)
    build.matmul("final", "head")
    build.node("ArgMax", ["head.y"], "id", axis=-1, keepdims=0)
    build.node("ReduceMax", ["head.y"], "highest", axes=[-1], keepdims=1)
    build.node("Sub", ["head.y", "highest"], "below")
    build.node("Exp", ["below"], "odds")
    build.node("ReduceSum", ["odds", build.constant("axes", np.array([-1], np.int64))], "sum", keepdims=0)
    build.node("Reciprocal", ["sum"], "probability")
    build.node("TopK", ["head.y", build.constant("choices", np.array([CHOICES], np.int64))], "best", "next_ids")
    build.node("Sub", ["best", "highest"], "best.below")
    build.node("Exp", ["best.below"], "best.odds")
    build.node("Div", ["best.odds", "sum"], "next_probabilities")
    cache = ["1", shape.kv_heads, "capacity", shape.head_dim]
    names = [f"{kind}.{layer}" for layer in range(shape.layers) for kind in ("keys", "values")]
    graph = helper.make_graph(
        build.nodes,
        "draft",
        [
            value_info("ids", TensorProto.INT64, [1, "tokens"]),
            value_info("length", TensorProto.INT32, [1]),
            value_info("total", TensorProto.INT32, []),
            *(value_info(name, TensorProto.FLOAT, cache) for name in names),
        ],
        [
            value_info("id", TensorProto.INT64, [1]),
            value_info("probability", TensorProto.FLOAT, [1]),
            value_info("next_ids", TensorProto.INT64, [1, CHOICES]),
            value_info("next_probabilities", TensorProto.FLOAT, [1, CHOICES]),
            *(value_info(f"new_{name}", TensorProto.FLOAT, cache) for name in names),
        ],
        build.initializers,
    )
    return model_bytes(graph)


class _Builder:
    def __init__(self, shape: DenseShape, layout: DraftLayout, weights_name: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._shape, self._layout = shape, layout
        for name, matrix in layout.matrices.items():
            self.initializers += [external(f"{name}.{p.part.suffix}", p, weights_name) for p in matrix.parts]
        for name, table in zip(("cosines", "sines"), _rotary(shape), strict=True):
            self.constant(name, table)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: list[str], *outputs: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(op, inputs, list(outputs), name=outputs[0], **attributes))

    def ours(self, op: str, inputs: list[str], *outputs: str, **attributes: object) -> None:
        self.node(op, inputs, *outputs, domain="com.microsoft", **attributes)

    def normed(self, x: str, name: str) -> None:
        eps = self._shape.rms_norm_eps
        self.node("SimplifiedLayerNormalization", [x, f"{name}.weight"], f"{name}.y", axis=-1, epsilon=eps)

    def added(self, x: str, more: str, name: str) -> str:
        """Add the norm of x + more as `<name>.y`; returns the name of the sum."""
        inputs, outputs = [x, more, f"{name}.weight"], [f"{name}.y", "", "", f"{name}.sum"]
        self.ours("SkipSimplifiedLayerNormalization", inputs, *outputs, epsilon=self._shape.rms_norm_eps)
        return outputs[3]

    def matmul(self, x: str, name: str) -> None:
        matrix = self._layout.matrices[name]
        inputs = [x, *(f"{name}.{p.part.suffix}" for p in matrix.parts)]
        self.ours(
            "MatMulNBits", inputs, f"{name}.y", K=matrix.columns, N=matrix.rows, bits=BITS[QUANTISATION.scheme],
            block_size=QUANTISATION.block, accuracy_level=ACCURACY_LEVEL,
        )  # fmt: skip

    def attention(self, layer: int) -> None:
        at = f"{layer}"
        self.matmul(f"{at}.norm1.y", f"{at}.qkv")
        self.ours(
            "GroupQueryAttention",
            [f"{at}.qkv.y", "", "", f"keys.{at}", f"values.{at}", "length", "total", "cosines", "sines"],
            *(f"{at}.mixed", f"new_keys.{at}", f"new_values.{at}"),
            num_heads=self._shape.heads, kv_num_heads=self._shape.kv_heads, do_rotary=1, rotary_interleaved=0,
        )  # fmt: skip
        self.matmul(f"{at}.mixed", f"{at}.out")

    def feed_forward(self, layer: int) -> None:
        at = f"{layer}"
        before = "embedded" if layer == 0 else f"{at}.norm1.sum"
        middle = self.added(before, f"{at}.out.y", f"{at}.norm2")
        self.matmul(f"{at}.norm2.y", f"{at}.gate")
        self.matmul(f"{at}.norm2.y", f"{at}.up")
        self.node("Sigmoid", [f"{at}.gate.y"], f"{at}.sigmoid")
        self.node("Mul", [f"{at}.gate.y", f"{at}.sigmoid"], f"{at}.silu")
        self.node("Mul", [f"{at}.silu", f"{at}.up.y"], f"{at}.inner")
        self.matmul(f"{at}.inner", f"{at}.down")
        last = layer + 1 == self._shape.layers
        self.added(middle, f"{at}.down.y", "norm" if last else f"{layer + 1}.norm1")


def _rotary(shape: DenseShape) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary embedding, float32 [positions, head size / 2]."""
    frequencies = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = np.arange(shape.max_positions)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
