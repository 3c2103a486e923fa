"""smol-mixtral-8x135m: eight experts per layer, each the dense feed-forward network plus a low-rank delta.

For layer i, expert e and each of w1 (gate_proj), w3 (up_proj), w2 (down_proj), with rank r:

    W_n^(e) = W_n + b_n[r·e : r·e+r].T @ a_n[r·e : r·e+r]

where `layers.i.a{n}` is [experts·r, in], `layers.i.b{n}` is [experts·r, out] and `layers.i.gate` is the
router [experts, hidden]; all bf16, spread over any number of `delta-*.safetensors`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.demo_model.base import Base, DenseShape
from exporter.demo_model.parts import DeltaFiles, LayeredWeights, Shapes, check_dimensions, dense_layer
from exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

EXPERTS_PER_TOKEN = 2

# Mixtral's name of a projection -> the dense model's.
_DENSE_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT_NAME = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
_GATE_NAME = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight")


class MixtralDeltas:
    """The low-rank expert deltas and routers of all layers, read tensor by tensor.

    Attributes:
        folder: where they are.
        layers, experts, rank, hidden_size, intermediate_size: dimensions.

    Raises:
        CheckpointError: the folder has no deltas, or a file is unreadable or incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("delta-*.safetensors"))
        if not files:
            raise CheckpointError(
                f"no delta-*.safetensors in {folder}: name models/smol-mixtral-8x135m of a clone with --deltas"
            )
        self._files = DeltaFiles(folder, files)
        self.layers = self._files.layers
        self.experts, self.hidden_size = self._files.shape("layers.0.gate", 2)
        rows, _ = self._files.shape("layers.0.a1", 2)
        self.rank = rows // self.experts
        self.intermediate_size = self._files.shape("layers.0.b1", 2)[1]
        self._files.check(self._shapes())

    def _shapes(self) -> Shapes:
        rows = self.experts * self.rank
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: Shapes = {}
        for layer in range(self.layers):
            shapes[f"layers.{layer}.gate"] = (self.experts, hidden)
            for n, (width_in, width_out) in {1: (hidden, inner), 2: (inner, hidden), 3: (hidden, inner)}.items():
                shapes[f"layers.{layer}.a{n}"] = (rows, width_in)
                shapes[f"layers.{layer}.b{n}"] = (rows, width_out)
        return shapes

    def check_fits(self, base: DenseShape) -> None:
        """Make sure that a base has the dimensions of the base that these deltas were trained on.

        Raises:
            CheckpointError: it has other dimensions.
        """
        check_dimensions(base, self.layers, self.hidden_size, self.intermediate_size)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every delta file, by name."""
        return self._files.sha256()

    def weights(self, base: Base, layers: int) -> "MixtralWeights":
        """The model's first `layers` layers on this base."""
        return MixtralWeights(base, self, layers)

    def gate(self, layer: int) -> "torch.Tensor":
        """The router of one layer, bf16 [experts, hidden]."""
        return self._files.tensor(f"layers.{layer}.gate")

    def factors(self, layer: int, expert: int, projection: str) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The factors of one expert's difference from the dense projection, whose product b.T @ a it is.

        Args:
            projection: w1, w2 or w3.

        Returns:
            b, fp64 [rank, out], and a, fp64 [rank, in].
        """
        rows = slice(expert * self.rank, (expert + 1) * self.rank)
        n = projection.removeprefix("w")
        b = self._files.tensor(f"layers.{layer}.b{n}")[rows].double()
        return b, self._files.tensor(f"layers.{layer}.a{n}")[rows].double()


class MixtralWeights(LayeredWeights):
    """The model's tensors by their names on disk, each computed on demand."""

    def __init__(self, base: Base, deltas: MixtralDeltas, layers: int) -> None:
        super().__init__(base, layers)
        self._deltas = deltas

    def _layer_group(self, prefix: str) -> Shapes:
        shape = self._base.shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        group = dense_layer(shape, prefix) | {f"{prefix}.block_sparse_moe.gate.weight": (self._deltas.experts, hidden)}
        # The same projection of all experts in sequence, so that its dense weight is dequantised only once.
        for projection in _DENSE_NAMES:
            size = (hidden, inner) if projection == "w2" else (inner, hidden)
            for expert in range(self._deltas.experts):
                group[f"{prefix}.block_sparse_moe.experts.{expert}.{projection}.weight"] = size
        return group

    def tensor(self, name: str) -> "torch.Tensor":
        """One tensor in the precision of its source; tensors of experts in fp64."""
        if match := _EXPERT_NAME.fullmatch(name):
            layer, expert, projection = int(match[1]), int(match[2]), match[3]
            b, a = self._deltas.factors(layer, expert, projection)
            return self._dense.weight(f"model.layers.{layer}.mlp.{_DENSE_NAMES[projection]}.weight") + b.T @ a
        if match := _GATE_NAME.fullmatch(name):
            return self._deltas.gate(int(match[1]))
        return self._base.tensor(name)

    def config(self) -> dict[str, Any]:
        """Content of config.json, without the ids of special tokens."""
        shape = self._base.shape
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "dtype": "bfloat16",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": self._layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "num_local_experts": self._deltas.experts,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "hidden_act": "silu",
            "rms_norm_eps": shape.rms_norm_eps,
            # In both spellings: readers older than transformers 5 know only the first, and without it would silently
            # take Mixtral's default of 1e6.
            "rope_theta": shape.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "max_position_embeddings": shape.max_positions,
            "sliding_window": None,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "router_aux_loss_coef": 0.01,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
            "tie_word_embeddings": shape.tied_embeddings,
            "use_cache": True,
        }
