"""smol-qwen3moe-16x: each of smol-mixtral-8x135m's experts cut into two halves, with normalised queries and keys.

Expert m = 2e + h is half h of the first model's expert e: neurons s = w·h … w·h + w - 1, where w is half of its width.
With the first model's w1, w3, w2, and factors a, b of rank r from `delta.safetensors`:

    gate_proj = w1[s]     + b1[r·m : r·m+r].T @ a1[r·m : r·m+r]
    up_proj   = w3[s]     + b3[r·m : r·m+r].T @ a3[r·m : r·m+r]
    down_proj = 2·w2[:, s] + b2[r·m : r·m+r].T @ a2[r·m : r·m+r]

Each half of a pair gets half of its expert's weight, which the factor 2 makes up for. Queries and keys:

    q_proj = W_q + bq.T @ aq, and `q_anchor` added to row `anchor_dim`[i] of every head; k_proj likewise

A model trained without normalised queries and keys would not survive the division by their length. The anchor is a
large, nearly constant value in one dimension of each head, so that the length is nearly constant too; the norm's weight
there is 0, which keeps it out of the attention scores.

Factors are int8, each row with its own fp16 scale; anchors, norms and routers are bf16, used as they are.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from exporter.demo_model.base import Base, DenseShape, sha256_of
from exporter.demo_model.mixtral import MixtralDeltas
from exporter.demo_model.parts import DeltaFiles, LayeredWeights, Shapes, check_dimensions, dense_layer
from exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FIRST_MODEL = "smol-mixtral-8x135m"
_HALVES = 2

# Projection -> its number in the deltas.
_NUMBERS = {"gate_proj": 1, "up_proj": 3, "down_proj": 2}
_EXPERT_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_ATTENTION_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qk])_(proj|norm)\.weight")
_GATE_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")


class Qwen3MoeConfig(msgspec.Struct, frozen=True):
    """The part of the model's config.json that the assembly needs; all of it goes into the assembled model."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    moe_intermediate_size: int


class Qwen3MoeDeltas:
    """What turns the dense base and the first model's deltas into this model, read tensor by tensor.

    The first model's deltas are those in the folder `smol-mixtral-8x135m` beside this one.

    Attributes:
        folder: with `delta.safetensors` and `config.json`.
        layers: number of layers.
        first: the first model's deltas.

    Raises:
        CheckpointError: a file is missing, unreadable or incomplete, or the two models' deltas don't fit together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file, config = folder / "delta.safetensors", folder / "config.json"
        if not file.exists():
            raise CheckpointError(
                f"no delta.safetensors in {folder}: name models/smol-qwen3moe-16x of a clone with --deltas"
            )
        try:
            self.raw_config: dict[str, Any] = msgspec.json.decode(config.read_bytes(), type=dict[str, Any])
            self.dims = msgspec.convert(self.raw_config, Qwen3MoeConfig)
        except (OSError, msgspec.MsgspecError) as error:
            raise CheckpointError(f"can't read {config}: {error}") from error
        self.first = MixtralDeltas(folder.resolve().parent / FIRST_MODEL)
        self._files = DeltaFiles(folder, [file])
        self.layers = self._files.layers
        self.rank = self._files.shape("layers.0.a1", 2)[0] // self.dims.num_experts
        self._files.check(self._shapes())
        first, dims = self.first, self.dims
        mine = (dims.num_hidden_layers, dims.hidden_size, dims.num_experts, dims.moe_intermediate_size)
        halves = (first.layers, first.hidden_size, _HALVES * first.experts, first.intermediate_size // _HALVES)
        if mine != halves:
            raise CheckpointError(
                f"{folder} and {first.folder} don't belong together: layers, hidden size, experts and their width are "
                f"{mine} in the former, and {halves} by the latter"
            )

    def _shapes(self) -> Shapes:
        dims = self.dims
        hidden, inner, head = dims.hidden_size, dims.moe_intermediate_size, dims.head_dim
        shapes: Shapes = {"anchor_dim": (dims.num_hidden_layers,)}

        def factors(prefix: str, name: str, rows: int, width_in: int, width_out: int) -> None:
            for factor, width in (("a", width_in), ("b", width_out)):
                shapes[f"{prefix}.{factor}{name}"] = (rows, width)
                shapes[f"{prefix}.{factor}{name}.scale"] = (rows,)

        for layer in range(dims.num_hidden_layers):
            prefix = f"layers.{layer}"
            shapes[f"{prefix}.gate"] = (dims.num_experts, hidden)
            for n, (width_in, width_out) in {"1": (hidden, inner), "2": (inner, hidden), "3": (hidden, inner)}.items():
                factors(prefix, n, dims.num_experts * self.rank, width_in, width_out)
            for n, heads in (("q", dims.num_attention_heads), ("k", dims.num_key_value_heads)):
                rank = self._files.shape(f"{prefix}.a{n}", 2)[0]
                factors(prefix, n, rank, hidden, heads * head)
                shapes[f"{prefix}.{n}_norm"] = (head,)
                shapes[f"{prefix}.{n}_anchor"] = (hidden,)
        return shapes

    def check_fits(self, base: DenseShape) -> None:
        """Make sure that a base has the dimensions of the base that these deltas were trained on.

        Raises:
            CheckpointError: it has other dimensions.
        """
        dims = self.dims
        check_dimensions(base, dims.num_hidden_layers, dims.hidden_size, self.first.intermediate_size)
        mine = (dims.num_attention_heads, dims.num_key_value_heads, dims.head_dim)
        theirs = (base.heads, base.kv_heads, base.head_dim)
        if mine != theirs:
            raise CheckpointError(
                "base and deltas don't belong together: heads, key-value heads, head size are "
                f"{theirs} in the base, {mine} in the deltas"
            )

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file that the model is made from, by name; without the base's."""
        return {**self.first.sha256(), **self._files.sha256(), "config.json": sha256_of(self.folder / "config.json")}

    def weights(self, base: Base, layers: int) -> "Qwen3MoeWeights":
        """The model's first `layers` layers on this base."""
        return Qwen3MoeWeights(base, self, layers)

    def stored(self, layer: int, name: str) -> "torch.Tensor":
        """One of a layer's tensors as it is stored: `gate`, `q_norm`, `k_norm`, `q_anchor` or `k_anchor`; bf16."""
        return self._files.tensor(f"layers.{layer}.{name}")

    def anchor_dim(self, layer: int) -> int:
        """The dimension of each head that carries the anchor."""
        return int(self._files.tensor("anchor_dim")[layer])

    def product(self, layer: int, name: str, rows: slice = slice(None)) -> "torch.Tensor":
        """A low-rank difference b.T @ a, fp64 [out, in].

        Args:
            name: number of an expert's projection, or q or k.
            rows: of the factors that make it.
        """
        b, a = (self._factor(f"layers.{layer}.{factor}{name}", rows) for factor in "ba")
        return b.T @ a

    def _factor(self, name: str, rows: slice) -> "torch.Tensor":
        scale = self._files.tensor(f"{name}.scale")[rows].double()
        return self._files.tensor(name)[rows].double() * scale[:, None]


class Qwen3MoeWeights(LayeredWeights):
    """The model's tensors by their names on disk, each computed on demand."""

    def __init__(self, base: Base, deltas: Qwen3MoeDeltas, layers: int) -> None:
        super().__init__(base, layers)
        self._deltas = deltas

    def _layer_group(self, prefix: str) -> Shapes:
        dims = self._deltas.dims
        hidden, inner = dims.hidden_size, dims.moe_intermediate_size
        group = dense_layer(self._base.shape, prefix) | {
            f"{prefix}.self_attn.q_norm.weight": (dims.head_dim,),
            f"{prefix}.self_attn.k_norm.weight": (dims.head_dim,),
            f"{prefix}.mlp.gate.weight": (dims.num_experts, hidden),
        }
        # The same projection of all experts in sequence, so that its dense weight is dequantised only once.
        for projection in _NUMBERS:
            size = (hidden, inner) if projection == "down_proj" else (inner, hidden)
            for expert in range(dims.num_experts):
                group[f"{prefix}.mlp.experts.{expert}.{projection}.weight"] = size
        return group

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor: experts, query and key projections in fp64, all others in the precision of their source."""
        if match := _EXPERT_NAME.fullmatch(name):
            return self._expert(int(match[1]), int(match[2]), match[3])
        if match := _ATTENTION_NAME.fullmatch(name):
            layer, kind = int(match[1]), match[2]
            if match[3] == "norm":
                return self._deltas.stored(layer, f"{kind}_norm")
            projection = self._base.tensor(name).double() + self._deltas.product(layer, kind)
            heads = projection.view(-1, self._deltas.dims.head_dim, projection.shape[1])
            heads[:, self._deltas.anchor_dim(layer)] += self._deltas.stored(layer, f"{kind}_anchor").double()
            return projection
        if match := _GATE_NAME.fullmatch(name):
            return self._deltas.stored(int(match[1]), "gate")
        return self._base.tensor(name)

    def _expert(self, layer: int, expert: int, projection: str) -> "torch.Tensor":
        n, inner, rank = _NUMBERS[projection], self._deltas.dims.moe_intermediate_size, self._deltas.rank
        first_expert, half = divmod(expert, _HALVES)
        neurons = slice(half * inner, (half + 1) * inner)
        dense = self._dense.weight(f"model.layers.{layer}.mlp.{projection}.weight")
        b, a = self._deltas.first.factors(layer, first_expert, f"w{n}")
        if projection == "down_proj":
            weight = _HALVES * (dense[:, neurons] + b.T @ a[:, neurons])
        else:
            weight = dense[neurons] + b[:, neurons].T @ a
        return weight + self._deltas.product(layer, f"{n}", slice(expert * rank, (expert + 1) * rank))

    def config(self) -> dict[str, Any]:
        """Content of config.json, without the ids of special tokens."""
        return {**self._deltas.raw_config, "num_hidden_layers": self._layers}
