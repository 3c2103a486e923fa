"""The trunk of a model with Llama's attention: embeddings, attention, norms, gates, head, KV cache.

Mixtral, and Qwen3-MoE, which normalises each head's queries and keys. Attention, norms and rotary embedding are
transformers' own modules, so the arithmetic is that of `MixtralForCausalLM` and `Qwen3MoeForCausalLM`. This module
knows neither nodes nor frames.
"""

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from bs_coordinator.config import TrunkDtype, TrunkQuantisation
from bs_coordinator.selection.routing import Routing, softmax_routing
from bs_coordinator.trunk import packed
from bs_coordinator.trunk.dtypes import TORCH_DTYPE
from bs_coordinator.trunk.inputs import Packing, SequenceInput
from bs_coordinator.trunk.interface import CacheMark, Trunk, TrunkPass
from bs_coordinator.trunk.passes import BlocksPass, GraphsPass, JointPass, RowsPass
from bs_coordinator.trunk.quantised import QuantisedLinear, quantise_linears
from bs_coordinator.trunk.rotary import depends_on_length, rotate
from bs_coordinator.trunk.rows import MAX_ROWS, Rows, rows_are_independent
from wire.errors import BundleError
from wire.tensors import Array

if TYPE_CHECKING:
    from bs_coordinator.trunk.cuda_graph import GraphedDecoder


class _Family(NamedTuple):
    attention: type[Any]
    block: str  # the layer's module that holds gate and experts


_FAMILIES = {
    "mixtral": _Family(MixtralAttention, "block_sparse_moe"),
    "qwen3_moe": _Family(Qwen3MoeAttention, "mlp"),
}
"""By `model_type` in config.json."""


def why_not_llama(config: Mapping[str, object]) -> str:
    """Why these blocks can't run a model, given its config.json; empty if they can."""
    if config.get("model_type") not in _FAMILIES:
        return "its blocks are not those of Mixtral or Qwen3-MoE"
    if config.get("attention_bias"):
        return "its attention has biases"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "some of its layers have no experts"
    return ""


class StepContext:
    """What all layers of one forward step share.

    Attributes:
        cache: the KV cache.
        rotary: cosines and sines of the rotary embedding.
        mask: attention mask, as transformers makes it.
    """

    def __init__(self, cache: DynamicCache, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        self.cache = cache
        self.rotary = rotary
        self.mask = mask


class LlamaTrunk(Trunk):
    """A loaded trunk on one device, run block by block.

    Attributes:
        config: the model's configuration, a `MixtralConfig` or a `Qwen3MoeConfig`.
        device, dtype: of the weights and of the arithmetic.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: TrunkDtype = "fp32",
        quantisation: TrunkQuantisation = "none", graphs: bool = True,
    ) -> None:  # fmt: skip
        """Load the `trunk/` folder of a bundle.

        Args:
            folder: with `config.json`, of a model that `why_not_llama` allows, and `model.safetensors`.
            device: as torch names it.
            dtype: of the weights and of the arithmetic.
            quantisation: of the weights of attention's products and of the head.
            graphs: run steps of a few tokens as captured graphs where device and model allow it.

        Raises:
            BundleError: files are missing or do not fit together.
            TrunkError: the weights can't be quantised so.
        """
        self.config: Any = _load_config(folder)
        family = _FAMILIES[self.config.model_type]
        # Every layer asks for these, and a configuration takes microseconds to look an attribute up.
        self._top_k: int = self.config.num_experts_per_tok
        self._renormalised = bool(getattr(self.config, "norm_topk_prob", True))
        self.device = torch.device(device)
        self.dtype = TORCH_DTYPE[dtype]
        with torch.device("meta"):
            self._modules = _TrunkModules(self.config, family.attention)
        quantise_linears(self._modules, quantisation)
        self._fp32_on_cpu = self.device.type == "cpu" and self.dtype == torch.float32
        packs = self._fp32_on_cpu and quantisation == "none" and packed.available()
        if packs:
            packed.pack_linears(self._modules)
        self._load(folder, family)
        self._modules.requires_grad_(False).eval()
        self._rotary = MixtralRotaryEmbedding(self.config).to(self.device)
        self._window: int | None = getattr(self.config, "sliding_window", None)
        self._graphed = _graphed(self._modules, self._rotary, self.config, self.device, self.dtype) if graphs else None
        self._create_mask = create_sliding_window_causal_mask if self._window else create_causal_mask
        self._independent: dict[int, bool] = {}
        if packs and not self.batch_invariant:
            packed.unpack_linears(self._modules)
            self._independent.clear()

    def _load(self, folder: Path, family: _Family) -> None:
        """Move tensors one by one from the file to the modules, which may quantise them at once."""
        file = folder / "model.safetensors"
        unexpected: list[str] = []
        tied = bool(self.config.tie_word_embeddings)
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    path, _, name = _module_key(key, family.block).rpartition(".")
                    if tied and path == "lm_head":
                        continue
                    try:
                        module = self._modules.get_submodule(path)
                    except AttributeError:
                        unexpected.append(key)
                        continue
                    value = tensors.get_tensor(key).to(self.device, self.dtype)
                    unexpected += module.load_state_dict({name: value}, strict=False, assign=True).unexpected_keys
        except (OSError, SafetensorError) as error:
            raise BundleError(f"can't read {file}: {error}") from None
        except RuntimeError as error:
            raise BundleError(f"{folder} does not hold the trunk that its config.json describes: {error}") from None
        if tied:
            self._modules.lm_head.weight = self._modules.embed_tokens.weight
        lacking = [name for name, value in self._modules.state_dict().items() if value.is_meta]
        if lacking or unexpected:
            what = f"it lacks {lacking[0]}" if lacking else f"{unexpected[0]} is not part of it"
            raise BundleError(f"{folder} does not hold the trunk that its config.json describes: {what}")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._modules.layers)

    def route(self, probabilities: Array) -> Routing:
        """The model's own choice of experts by the gate's probabilities, float32 [tokens, experts]."""
        return softmax_routing(probabilities, self._top_k, renormalised=self._renormalised)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights as they are kept, in bytes."""
        return sum(value.nbytes for value in {*self._modules.parameters(), *self._modules.buffers()})

    @property
    def max_positions(self) -> int:
        """The model's context length in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def can_truncate(self) -> bool:
        """Always: every layer keeps the keys of all positions."""
        return True

    @property
    def continues(self) -> bool:
        """Always: a token needs nothing of those before it but their keys and values."""
        return True

    @property
    def scored(self) -> bool:
        """Always: the gate's softmax."""
        return True

    @property
    def pipelines(self) -> bool:
        """Always: later tokens of a sequence need only the keys of their own layer."""
        return True

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's results are bitwise independent of the tokens computed with it (`trunk.rows`)."""
        if not self._fp32_on_cpu:
            return False
        # A kernel may divide its work among more threads in another order.
        threads = torch.get_num_threads()
        if threads not in self._independent:
            layers = [m for m in self._modules.modules() if isinstance(m, packed.PackedLinear | QuantisedLinear)]
            self._independent[threads] = rows_are_independent(layers)
        return self._independent[threads]

    @property
    def packs(self) -> bool:
        """Whether several sequences can be packed into one: not with a sliding window or a rope that depends on the
        length of a sequence."""
        return not self._window and not self.rope_by_length

    @property
    def rope_by_length(self) -> bool:
        """Whether the rotary embedding of a token depends on how long its sequence is."""
        return depends_on_length(self._rotary)

    def new_cache(self) -> DynamicCache:
        """An empty KV cache."""
        if self._graphed:
            return self._graphed.new_cache()
        # Made from the config, a cache would drop keys outside a sliding window: it could not be cut any more.
        cache = DynamicCache()
        cache.layers = [DynamicLayer() for _ in range(self.layers)]
        return cache

    def truncate(self, cache: DynamicCache, tokens: int) -> None:
        """Remove all but the first `tokens` positions; layers that hold fewer stay as they are."""
        for layer in cache.layers:
            excess = layer.get_seq_length() - tokens
            if excess > 0:
                layer.crop(-excess)

    def mark(self, cache: DynamicCache) -> CacheMark:
        """What the cache holds now."""
        return CacheMark(cache.get_seq_length())

    def restore(self, cache: DynamicCache, mark: CacheMark) -> None:
        """Bring a cache back to what it held when it was marked."""
        self.truncate(cache, mark.tokens)

    def start_pass(self, inputs: Sequence[SequenceInput]) -> TrunkPass:
        """Begin to take sequences through the trunk, in the order of `inputs`."""
        # All or none: while a graph waits for its experts, nothing else runs on its stream.
        if all(s.packing is None and s.parents is None for s in inputs) and (graphs := self.graphs(inputs)):
            return GraphsPass(graphs, inputs, self.route)
        passes: list[TrunkPass] = []
        # Neighbours with few tokens share one pass, where this trunk runs them as rows.
        for few, group in itertools.groupby(inputs, lambda s: len(s.ids) <= MAX_ROWS and s.packing is None):
            some = list(group)
            rows = self.rows(some) if few else None
            passes.append(RowsPass(rows, some, self.route) if rows else BlocksPass(self, some))
        return passes[0] if len(passes) == 1 else JointPass(passes)

    def embed(
        self, ids: Tensor, cache: DynamicCache, packing: Packing | None = None, *, length: int = 0
    ) -> tuple[Tensor, StepContext]:
        """Begin a step of one sequence.

        Args:
            ids: int64 [tokens], that follow what the cache holds.
            cache: the sequence's KV cache.
            packing: if the ids are several sequences.
            length: of the sequence that the ids belong to, if it is longer than what the cache will then hold.

        Returns:
            Hidden states [1, tokens, hidden], and what the layers of this step share.

        Raises:
            BundleError: the ids are packed, but this model's sequences can't be.
        """
        hidden = self._modules.embed_tokens(ids.to(self.device)[None])
        if packing is not None:
            if not self.packs:
                raise BundleError("sequences can't be packed for this model: its tokens depend on their sequence")
            positions = packing.positions.to(self.device)[None]
            mask = packing.visible.to(self.device)[None, None]
            return hidden, StepContext(cache, self._rotary(hidden, position_ids=positions), mask)
        past = cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[0], device=self.device)[None]
        mask = self._create_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=cache,
            position_ids=positions,
        )
        rotary = rotate(self._rotary, hidden, positions[0].tolist(), [length] * len(ids))
        return hidden, StepContext(cache, rotary, mask)

    def attend(self, layer: int, hidden: Tensor, step: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """Run the first half of a layer.

        Args:
            layer: index of the layer.
            hidden: [1, tokens, hidden].
            step: from `embed`.

        Returns:
            The residual [1, tokens, hidden], the experts' input [tokens, hidden] and the gate's probabilities
            [tokens, experts] in fp32.
        """
        block: Any = self._modules.layers[layer]
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(hidden),
            position_embeddings=step.rotary,
            attention_mask=step.mask,
            past_key_values=step.cache,
        )
        residual = hidden + attended
        expert_input = block.post_attention_layernorm(residual)[0]
        probabilities = torch.softmax(block.gate(expert_input).float(), dim=-1)
        return residual, expert_input, probabilities

    def rows(self, inputs: Sequence[SequenceInput]) -> Rows | None:
        """Begin a step of sequences with few new tokens each; None if this trunk is not `batch_invariant`."""
        if not self.batch_invariant:
            return None
        return Rows(
            self._modules, self._rotary, [s.ids for s in inputs], [s.cache for s in inputs],
            [s.length for s in inputs], window=self._window, parents=[s.parents for s in inputs],
        )  # fmt: skip

    def graphs(self, inputs: Sequence[SequenceInput]) -> "GraphedDecoder | None":
        """The captured graphs, if they can run these tokens; None if they must run eagerly."""
        if self._graphed and self._graphed.takes([len(s.ids) for s in inputs], [s.cache for s in inputs]):
            return self._graphed
        return None

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in fp32 [tokens, vocab] from [1, tokens, hidden]."""
        logits: Tensor = self._modules.lm_head(self._modules.norm(hidden))[0].float()
        return logits


class _TrunkBlock(nn.Module):
    def __init__(self, config: Any, attention: type[Any], layer: int) -> None:
        super().__init__()
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)


class _TrunkModules(nn.Module):
    def __init__(self, config: Any, attention: type[Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_TrunkBlock(config, attention, i) for i in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def _module_key(key: str, block: str) -> str:
    return key.removeprefix("model.").replace(f".{block}.gate.", ".gate.")


def _load_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} has no config.json: this bundle holds experts only, use the exporter's own")
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = "sdpa"
    return config


def _graphed(
    modules: Any, rotary: Any, config: Any, device: torch.device, dtype: torch.dtype
) -> "GraphedDecoder | None":
    # Triton comes with torch for CUDA only.
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from bs_coordinator.trunk.cuda_graph import GraphedDecoder, fits

    return GraphedDecoder(modules, rotary, config, device, dtype) if fits(config, rotary.rope_type, device) else None
