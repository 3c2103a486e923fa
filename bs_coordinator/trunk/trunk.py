"""The part of a Mixtral that stays on the base station: embeddings, attention, norms, gates, head, KV cache.

ArrivalTiming, norms and rotary embedding are transformers' own modules, so that this is the same arithmetic as
`MixtralForCausalLM`. This module knows neither nodes nor frames.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)

from bs_coordinator.config import TrunkDtype
from bs_coordinator.trunk.rows import Rows

if TYPE_CHECKING:
    from bs_coordinator.trunk.cuda_graph import GraphedDecoder
from bs_coordinator.errors import TrunkError
from wire.errors import BundleError

_TORCH_DTYPE: dict[TrunkDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Packing(NamedTuple):
    """Several sequences in one: many short ones take far fewer and larger products this way.

    Attributes:
        positions: int64 [tokens], of each token within its own sequence.
        visible: bool [tokens, past + tokens], what each token attends to: all that came before it in its sequence,
            and itself.
    """

    positions: Tensor
    visible: Tensor


class StepContext:
    """What all layers of one forward step share: cache, rotary embedding and attention mask."""

    def __init__(self, cache: DynamicCache, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> None:
        self.cache = cache
        self.rotary = rotary
        self.mask = mask


def check_device(name: str) -> None:
    """Make sure that a trunk can run there.

    Raises:
        TrunkError: it is no device, one that trunks don't run on, or not in this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise TrunkError(f"--device {name}: the trunk runs on cpu, cuda or a certain GPU such as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrunkError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu")


class Trunk:
    """A loaded trunk on one device."""

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: TrunkDtype = "fp32", graphs: bool = True
    ) -> None:  # fmt: skip
        """Load `trunk/` of a bundle.

        Args:
            graphs: run single tokens as captured graphs where device and model allow.

        Raises:
            BundleError: files are missing or don't fit together.
        """
        self.config: Any = _load_config(folder)
        self.device = torch.device(device)
        self.dtype = _TORCH_DTYPE[dtype]
        with torch.device("meta"):
            self._modules = _TrunkModules(self.config)
        try:
            state = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise BundleError(f"can't read {folder / 'model.safetensors'}: {error}") from None
        state = {_module_key(key): value.to(self.device, self.dtype) for key, value in state.items()}
        if self.config.tie_word_embeddings:
            state["lm_head.weight"] = state["embed_tokens.weight"]
        try:
            self._modules.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise BundleError(f"{folder} does not hold this model's trunk: {error}") from None
        self._modules.requires_grad_(False).eval()
        self._rotary = MixtralRotaryEmbedding(self.config).to(self.device)
        sliding = getattr(self.config, "sliding_window", None)
        self._graphed = _graphed(self._modules, self._rotary, self.config, self.device, self.dtype) if graphs else None
        self._create_mask = create_sliding_window_causal_mask if sliding else create_causal_mask

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._modules.layers)

    @property
    def eos_id(self) -> int | None:
        """End-of-sequence token of the model's config, where it names exactly one."""
        eos = self.config.eos_token_id
        return eos if isinstance(eos, int) else None

    @property
    def batch_invariant(self) -> bool:
        """Whether what a token gets does not depend on how many come with it, bit for bit (`trunk_rows`)."""
        sliding = getattr(self.config, "sliding_window", None)
        return self.device.type == "cpu" and self.dtype == torch.float32 and not sliding

    def new_cache(self) -> DynamicCache:
        """An empty KV cache."""
        if self._graphed:
            return self._graphed.new_cache()
        return DynamicCache(config=self.config)

    @staticmethod
    def truncate(cache: DynamicCache, tokens: int) -> None:
        """Forget all but the first `tokens` positions; layers that hold fewer keep what they have."""
        for layer in cache.layers:
            excess = layer.get_seq_length() - tokens
            if excess > 0:
                layer.crop(-excess)

    def embed(self, ids: Tensor, cache: DynamicCache, packing: Packing | None = None) -> tuple[Tensor, StepContext]:
        """Begin a step with token ids [tokens] that follow what `cache` holds: hidden [1, tokens, hidden].

        Args:
            packing: where the ids are several sequences.

        Raises:
            BundleError: several sequences, but the model's attention has a sliding window.
        """
        hidden = self._modules.embed_tokens(ids.to(self.device)[None])
        if packing is not None:
            if getattr(self.config, "sliding_window", None):
                raise BundleError("sequences can't be packed for this model: its attention has a sliding window")
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
        return hidden, StepContext(cache, self._rotary(hidden, position_ids=positions), mask)

    def attend(self, layer: int, hidden: Tensor, step: StepContext) -> tuple[Tensor, Tensor, Tensor]:
        """First half of a layer.

        Args:
            hidden: [1, tokens, hidden].

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

    def rows(self, ids: Sequence[Sequence[int]], caches: Sequence[DynamicCache]) -> Rows | None:
        """Begin a step of sequences with few new tokens each, or None where that is not how they are run here."""
        if not self.batch_invariant:
            return None
        return Rows(self._modules, self._rotary, ids, caches)

    def graphs(self, ids: Sequence[int], cache: DynamicCache) -> "GraphedDecoder | None":
        """What runs a step of one sequence without the host in the way, or None where it has to run eagerly."""
        return self._graphed if self._graphed and len(ids) == 1 and self._graphed.takes(cache) else None

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in fp32 [tokens, vocab] from [1, tokens, hidden]."""
        logits: Tensor = self._modules.lm_head(self._modules.norm(hidden))[0].float()
        return logits


class _TrunkBlock(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.input_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MixtralAttention(config, layer)
        self.post_attention_layernorm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)


class _TrunkModules(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_TrunkBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


def _module_key(key: str) -> str:
    return key.removeprefix("model.").replace(".block_sparse_moe.gate.", ".gate.")


def _load_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} has no config.json: this bundle holds experts only, use the exporter's own")
    config: Any = MixtralConfig.from_pretrained(folder)
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
