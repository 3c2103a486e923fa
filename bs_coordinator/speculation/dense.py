"""A small dense model on the base station as a drafter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from wire.errors import BundleError


class DenseModel:
    """The draft model's weights, shared by all sequences."""

    def __init__(self, folder: Path, *, vocabulary: int, device: str = "cpu") -> None:
        """Load a Hugging Face folder.

        Raises:
            BundleError: there is no such model, or it has another vocabulary.
        """
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BundleError(f"--draft-model {folder}: {str(error).partition(chr(10))[0]}") from None
        if model.config.vocab_size != vocabulary:
            raise BundleError(
                f"--draft-model {folder}: its vocabulary has {model.config.vocab_size} tokens, the model's has "
                f"{vocabulary}"
            )
        self.model = model.to(device).eval()


class DenseDrafter:
    """Greedy continuations by a dense model, with a KV cache of its own."""

    def __init__(self, dense: DenseModel) -> None:
        self._model = dense.model
        self._cache = DynamicCache(config=dense.model.config)
        self._ids: list[int] = []

    @torch.inference_mode()
    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """See `Drafter`."""
        shared = 0
        limit = min(len(self._ids), len(ids) - 1)
        while shared < limit and self._ids[shared] == ids[shared]:
            shared += 1
        if shared < len(self._ids):
            self._cache.crop(shared)
        self._ids = list(ids)
        pending, drafted = list(ids[shared:]), []
        for _ in range(count):
            output = self._model(
                torch.tensor([pending], device=self._model.device), past_key_values=self._cache, logits_to_keep=1
            )
            pending = [int(output.logits[0, -1].argmax())]
            drafted += pending
        # The last one was not run.
        self._ids += drafted[:-1]
        return drafted
