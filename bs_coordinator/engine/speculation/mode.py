"""What sequences of one model share when they draft, and which drafters a mode means."""

from pathlib import Path
from typing import Protocol

from bs_coordinator.config import DraftMode
from bs_coordinator.engine.speculation.acceptance import Acceptance
from bs_coordinator.engine.speculation.cost import StepCost
from bs_coordinator.engine.speculation.drafts import Drafter, FirstOf, NgramDrafter
from bs_coordinator.engine.step_records import StepRecord
from wire.draft import DRAFT_FOLDER, DRAFT_NAME, tokens_sha256
from wire.errors import BundleError
from wire.manifest import Manifest, verify_file


class DraftModel(Protocol):
    """A loaded draft model."""

    def drafter(self) -> Drafter:
        """For one sequence."""


class Speculation:
    """One model's drafting.

    Attributes:
        cost: what its steps cost.
        acceptance: how often guesses are right.
    """

    def __init__(self, mode: DraftMode = "none", model: DraftModel | None = None) -> None:
        """Nothing is learnt yet.

        Raises:
            ValueError: `dense` without a draft model.
        """
        if mode == "dense" and model is None:
            raise ValueError("'dense' needs a draft model")
        self.mode = mode
        self.cost = StepCost()
        self.acceptance = Acceptance()
        self._model = model

    def drafter(self) -> Drafter | None:
        """For a new sequence; None where nothing is drafted."""
        if self.mode == "none":
            return None
        if self._model is None or self.mode == "ngram":
            return NgramDrafter()
        if self.mode == "dense":
            return self._model.drafter()
        return FirstOf(NgramDrafter(), self._model.drafter(), share=self.acceptance.share)

    def anew(self, mode: DraftMode) -> "Speculation":
        """Another one that has learnt nothing, with the same draft model.

        Raises:
            ValueError: `dense` without a draft model.
        """
        return Speculation(mode, self._model)

    def observe(self, step: StepRecord, *, sequences: int, tokens: int) -> None:
        """Learn from a step of any of the model's sequences.

        Args:
            sequences: that shared it.
            tokens: that came of it, of all of them.
        """
        if step.phase == "decode":
            self.cost.observe(step.tokens, step.total_ns / 1e9, sequences=sequences, tokens=tokens)


def load_draft_model(
    bundle: Path, manifest: Manifest, ids: dict[str, int], *, folder: Path | None, device: str
) -> DraftModel | None:
    """The draft model that is named, else the bundle's own, else None.

    Args:
        ids: the model's tokens.
        folder: of `wdmoe-export draft`, or a Hugging Face folder.
        device: of a Hugging Face model, as torch names it.

    Raises:
        BundleError: it is damaged or has another vocabulary.
    """
    if folder is None:
        if not manifest.draft:
            return None
        for file in manifest.draft:
            verify_file(bundle, file)
        folder = bundle / DRAFT_FOLDER
    if (folder / DRAFT_NAME).is_file():
        from bs_coordinator.engine.speculation.draft_graph import DraftGraph

        graph = DraftGraph(folder)
        _check_vocabulary(folder, graph.manifest.tokens_sha256, ids)
        return graph
    if not (folder / "config.json").is_file():
        raise BundleError(
            f"draft model {folder}: no {DRAFT_NAME} and no config.json there: name a folder of 'wdmoe-export draft' or "
            "of Hugging Face"
        )
    from bs_coordinator.engine.speculation.dense import DenseModel
    from bs_coordinator.engine.tokenizer import Tokenizer

    _check_vocabulary(folder, tokens_sha256(Tokenizer(folder).ids), ids)
    return DenseModel(folder, device=device)


def _check_vocabulary(folder: Path, sha256: str, ids: dict[str, int]) -> None:
    if sha256 != tokens_sha256(ids):
        raise BundleError(f"draft model {folder}: its vocabulary is not the model's, and so it can't draft for it")
