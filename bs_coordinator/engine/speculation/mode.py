"""Drafting modes, the drafters they stand for, and what all sequences of a model share when they draft."""

from pathlib import Path
from typing import Protocol

from bs_coordinator.config import DraftMode
from bs_coordinator.engine.speculation.acceptance import Acceptance
from bs_coordinator.engine.speculation.cost import StepCost
from bs_coordinator.engine.speculation.drafts import Drafter, FirstOf, NgramDrafter
from bs_coordinator.engine.speculation.spare_time import SpareTime
from bs_coordinator.engine.step_records import StepRecord
from wire.draft import DRAFT_FOLDER, DRAFT_NAME, tokens_sha256
from wire.errors import BundleError
from wire.manifest import Manifest, verify_file


class DraftModel(Protocol):
    """A loaded draft model."""

    def drafter(self) -> Drafter:
        """A drafter for one sequence."""


class Speculation:
    """How the sequences of one model draft, and what they have learnt together.

    Attributes:
        mode: of drafting.
        cost: of the model's steps.
        acceptance: of draft tokens.
        spare: when draft models read while nodes are awaited; None if they never do.
        branching: whether steps may try several tokens for one position.
    """

    def __init__(
        self,
        mode: DraftMode = "none",
        model: DraftModel | None = None,
        *,
        read_ahead: bool = True,
        branching: bool = True,
    ) -> None:
        """A mode that has learnt nothing yet.

        Args:
            mode: of drafting.
            model: the draft model, if any.
            read_ahead: whether the draft model may read while nodes are awaited.
            branching: whether steps may try several tokens for one position.

        Raises:
            ValueError: `dense` without a draft model.
        """
        if mode == "dense" and model is None:
            raise ValueError("'dense' needs a draft model")
        self.mode = mode
        self.cost = StepCost()
        self.acceptance = Acceptance()
        self.spare = SpareTime() if read_ahead else None
        self.branching = branching
        self._model = model

    def drafter(self) -> Drafter | None:
        """A drafter for a new sequence; None in mode `none`."""
        if self.mode == "none":
            return None
        if self._model is None or self.mode == "ngram":
            return NgramDrafter()
        if self.mode == "dense":
            return self._model.drafter()
        return FirstOf(NgramDrafter(), self._model.drafter(), share=self.acceptance.share)

    def restarted(self, mode: DraftMode, *, read_ahead: bool = True, branching: bool = True) -> "Speculation":
        """A new `Speculation` with the same draft model, which has learnt nothing.

        Raises:
            ValueError: `dense` without a draft model.
        """
        return Speculation(mode, self._model, read_ahead=read_ahead, branching=branching)

    def observe(self, step: StepRecord, *, sequences: int, tokens: int) -> None:
        """Learn from a step of any of the model's sequences.

        Args:
            step: its record.
            sequences: number of sequences that shared the step.
            tokens: number of tokens it yielded, for all sequences.
        """
        if step.phase == "decode":
            self.cost.observe(step.tokens, step.total_ns / 1e9, sequences=sequences, tokens=tokens)


def load_draft_model(
    bundle: Path, manifest: Manifest, ids: dict[str, int], *, folder: Path | None, device: str
) -> DraftModel | None:
    """The draft model in `folder`, else the bundle's own, else None.

    Args:
        bundle: of the model.
        manifest: of the bundle.
        ids: the model's vocabulary.
        folder: made by `wdmoe-export draft`, or a Hugging Face folder.
        device: for a Hugging Face model, as torch names it.

    Raises:
        BundleError: the draft model is missing or damaged, or has another vocabulary than the model.
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
            f"draft model {folder}: no {DRAFT_NAME} and no config.json in it: with --draft-model, name a folder made "
            "by 'wdmoe-export draft' or a Hugging Face folder"
        )
    from bs_coordinator.engine.speculation.dense import DenseModel
    from bs_coordinator.engine.tokenizer import Tokenizer

    _check_vocabulary(folder, tokens_sha256(Tokenizer(folder).ids), ids)
    return DenseModel(folder, device=device)


def _check_vocabulary(folder: Path, sha256: str, ids: dict[str, int]) -> None:
    if sha256 != tokens_sha256(ids):
        raise BundleError(
            f"draft model {folder}: its vocabulary differs from the model's: use a draft model with the same one"
        )
