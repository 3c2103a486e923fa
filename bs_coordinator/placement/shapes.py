"""What of a model counts for a plan: its experts' number and size, and the bytes of its trunk. Pure."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from wire.manifest import Manifest, Quantisation

_BF16_BYTES = 2
_LEAST_SLICE_BYTES = 1 << 20
"""Slices below this size are not planned: a call's own time would exceed that of reading them."""
_MOST_SLICES = 16

NAMED: dict[str, dict[str, int]] = {
    "mixtral-8x7b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936,
    },
}  # fmt: skip
"""Parts of the config.json of mistralai/Mixtral-8x7B-Instruct-v0.1 and of Qwen/Qwen3-30B-A3B."""


class ModelShape(NamedTuple):
    """A model, as far as a plan needs it.

    Attributes:
        name: for messages.
        hidden: values of a hidden state.
        intermediate: inner size of an expert.
        layers: layers with experts.
        experts: routed experts per layer.
        top_k: experts that a token asks per layer.
        trunk_bytes: weights of everything but the routed experts that a token reads, in bf16.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    trunk_bytes: int

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate


class Variant(NamedTuple):
    """How experts are stored.

    Attributes:
        slices: parts of each expert, which devices hold separately.
        unit_bytes: size of the files of one unit: an expert, or a slice.
    """

    quantisation: Quantisation
    slices: int
    unit_bytes: int


def shape_of_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape in a config.json. The size of the trunk assumes grouped-query attention in every layer.

    Raises:
        ValueError: a number is missing, not positive, or there are fewer experts than a token asks.
    """

    def number(*keys: str, default: int | None = None) -> int:
        value = next((config[key] for key in keys if config.get(key) is not None), default)
        if type(value) is not int or value < (0 if default == 0 else 1):
            raise ValueError(f"{name} has no valid {' or '.join(keys)}: is it the config.json of a mixture of experts?")
        return value

    hidden, all_layers = number("hidden_size"), number("num_hidden_layers")
    heads = number("num_attention_heads")
    head = number("head_dim", default=max(1, hidden // heads))
    attention = 2 * hidden * head * (heads + number("num_key_value_heads", default=heads))
    shape = ModelShape(
        name=name,
        hidden=hidden,
        intermediate=number("moe_intermediate_size", "intermediate_size"),
        layers=all_layers - number("first_k_dense_replace", default=0),
        experts=number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        top_k=number("num_experts_per_tok", "moe_k", "moe_topk"),
        trunk_bytes=_BF16_BYTES * (all_layers * attention + number("vocab_size") * hidden),
    )
    if shape.top_k > shape.experts or shape.layers < 1:
        raise ValueError(f"{name}: {shape.top_k} of {shape.experts} experts in {shape.layers} layers is not possible")
    return shape


def shape_of_manifest(manifest: Manifest) -> ModelShape:
    """The shape of a bundle's model; all of its trunk's files count."""
    dims = manifest.dims
    return ModelShape(
        manifest.source.name, dims.hidden, dims.intermediate, dims.layers, dims.experts, dims.top_k,
        sum(entry.bytes for entry in manifest.trunk),
    )  # fmt: skip


def variant(shape: ModelShape, quantisation: Quantisation, slices: int) -> Variant:
    """A variant that `wdmoe-export bundle` would make, with the size of its files.

    Blocks of int4 and int8 have a scale of four bytes and, unless symmetric, a zero point as wide as a weight.
    """
    per_weight = sum(_bytes_per_weight(quantisation.of_matrix(matrix)) for matrix in ("w1", "w3", "w2")) / 3
    return Variant(quantisation, slices, -(-int(shape.expert_weights * per_weight) // slices))


def _bytes_per_weight(quantisation: Quantisation) -> float:
    width = {"int4": 0.5, "int8": 1.0, "int8-dynamic": 1.0, "fp16": 2.0, "fp32": 4.0}[quantisation.scheme]
    per_block = 4 + (0 if quantisation.symmetric else width)
    return width + (per_block / quantisation.block if quantisation.block else 0)


def possible_slices(shape: ModelShape, quantisation: Quantisation) -> list[int]:
    """1, 2, 4, … as long as slices are not too small and each has at least one block."""
    blocks = -(-shape.intermediate // (quantisation.block or 1))
    counts = [1]
    while (more := 2 * counts[-1]) <= min(_MOST_SLICES, blocks) and variant(
        shape, quantisation, more
    ).unit_bytes >= _LEAST_SLICE_BYTES:
        counts.append(more)
    return counts
