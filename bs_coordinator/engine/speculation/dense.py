"""A small dense model on the base station as a drafter, run by transformers: any architecture whose cache can be
shortened, also on a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from bs_coordinator.engine.speculation.model_drafter import Choice, ModelDrafter
from wire.errors import BundleError

_ROUNDING = 0.05
"""Relative difference up to which logits count as the same; bf16 on a GPU rounds differently by batch."""


class DenseModel:
    """The draft model's weights, shared by all sequences."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Load a Hugging Face folder.

        Args:
            folder: of the model.
            device: as torch names it; bf16 on anything but the CPU.

        Raises:
            BundleError: the folder has no loadable causal language model, or one that can't take back tokens that it
                read, as linear attention can't.
        """
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BundleError(f"draft model {folder}: {str(error).partition(chr(10))[0]}") from None
        self.model = model.to(device).eval()
        config = model.config.get_text_config()
        self.max_positions: int = getattr(config, "max_position_embeddings", 0)
        # Wrong draft tokens are taken back. Layers with a window keep all keys here: made from the config, they would
        # drop those outside it, and could not be cut any more.
        layers = DynamicCache(config=config).layers
        if not self.max_positions or not all(_keeps_all_keys(layer) for layer in layers) or not self._can_take_back():
            raise BundleError(
                f"draft model {folder}: tokens that a '{config.model_type}' model has read can't be taken back, as "
                "drafting requires: use a model with full or sliding-window attention in all layers"
            )

    @torch.inference_mode()
    def _can_take_back(self) -> bool:
        """Whether another continuation after a rollback gives what it gives from the start."""
        begin, wrong, right = [1, 2, 3], [4, 5], [3, 1]
        again, fresh = _DenseReader(self), _DenseReader(self)
        again.logits(begin + wrong, 0)
        expected, found = fresh.logits(begin + right, 0), again.logits(right, len(begin))
        return bool(torch.allclose(found, expected, rtol=_ROUNDING, atol=_ROUNDING * float(expected.abs().max())))

    def drafter(self) -> ModelDrafter:
        """A drafter for one sequence."""
        return ModelDrafter(_DenseReader(self))


def _keeps_all_keys(layer: Any) -> bool:
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


class _DenseReader:
    """The model and one sequence's KV cache; implements `Reader`."""

    def __init__(self, dense: DenseModel) -> None:
        self.max_positions = dense.max_positions
        self._model = dense.model
        self._cache = DynamicCache()

    def read(self, ids: Sequence[int], past: int) -> list[Choice]:
        # The others would be of use for reading ahead only, which this model does not do.
        probability, id = torch.softmax(self.logits(ids, past), dim=-1).max(dim=-1)
        return [Choice(int(id), float(probability))]

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], past: int) -> torch.Tensor:
        """As `read`, but the logits of the next token, float32 [vocabulary]."""
        excess = self._cache.get_seq_length() - past
        if excess > 0:
            self._cache.crop(-excess)
        pending = torch.tensor([ids], device=self._model.device)
        logits: torch.Tensor = self._model(pending, past_key_values=self._cache, logits_to_keep=1).logits[0, -1]
        return logits.float()
