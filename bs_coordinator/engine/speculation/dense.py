"""A small dense model on the base station as a drafter, run by transformers: any architecture, also on a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from bs_coordinator.engine.speculation.model_drafter import ModelDrafter
from wire.errors import BundleError


class DenseModel:
    """The draft model's weights, shared by all sequences."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Load a Hugging Face folder.

        Args:
            folder: of the model.
            device: as torch names it; bf16 on anything but the CPU.

        Raises:
            BundleError: the folder has no loadable causal language model.
        """
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BundleError(f"draft model {folder}: {str(error).partition(chr(10))[0]}") from None
        self.model = model.to(device).eval()

    def drafter(self) -> ModelDrafter:
        """A drafter for one sequence."""
        return ModelDrafter(_DenseReader(self))


class _DenseReader:
    """The model and one sequence's KV cache; implements `Reader`."""

    def __init__(self, dense: DenseModel) -> None:
        self.max_positions: int = dense.model.config.max_position_embeddings
        self._model = dense.model
        self._cache = DynamicCache(config=dense.model.config)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], past: int) -> tuple[int, float]:
        excess = self._cache.get_seq_length() - past
        if excess > 0:
            self._cache.crop(-excess)
        pending = torch.tensor([ids], device=self._model.device)
        logits = self._model(pending, past_key_values=self._cache, logits_to_keep=1).logits[0, -1]
        probability, id = torch.softmax(logits.float(), dim=-1).max(dim=-1)
        return int(id), float(probability)
