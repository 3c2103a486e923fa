"""What goes into a step of the model, and how it is cut into micro_batches. Pure."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers.cache_utils import DynamicCache

from bs_coordinator.trunk.trunk import Packing


class SequenceInput(NamedTuple):
    """One sequence's share of a step: token ids that follow what its cache holds.

    Attributes:
        packing: where it is several sequences after all.
        rows: the tokens whose logits are wanted, instead of the last one's.
    """

    ids: list[int]
    cache: DynamicCache
    packing: Packing | None = None
    rows: list[int] | None = None

    @property
    def wanted(self) -> list[int]:
        """The tokens whose logits are wanted, where not all are."""
        return [-1] if self.rows is None else self.rows


class Piece(NamedTuple):
    """A sequence, or some consecutive tokens of one.

    Attributes:
        number: of the sequence in its step.
        first_token: its place among all tokens of the step, sequence after sequence.
    """

    number: int
    first_token: int
    inputs: SequenceInput


def cut_inputs(inputs: Sequence[SequenceInput], *, most_tokens: int, all_logits: bool) -> list[list[Piece]]:
    """Cut inputs into micro-batches: the first has a piece of every sequence, later ones the next pieces of long ones.

    Only inputs that want their last token's logits, or all, are cut, and no packed ones.

    Args:
        most_tokens: of a sequence in one batch; pieces of one sequence are alike in size.
        all_logits: all tokens' logits are wanted.
    """
    micro_batches: list[list[Piece]] = [[]]
    first = 0
    for number, sequence in enumerate(inputs):
        whole = sequence.packing is not None or (sequence.rows is not None and not all_logits)
        count = 1 if whole else max(1, math.ceil(len(sequence.ids) / most_tokens))
        micro_batches += ([] for _ in range(count - len(micro_batches)))
        bounds = [len(sequence.ids) * i // count for i in range(count + 1)]
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            last = i == count - 1
            piece = (
                sequence
                if count == 1
                else SequenceInput(sequence.ids[start:end], sequence.cache, rows=None if last else [])
            )
            micro_batches[i].append(Piece(number, first + start, piece))
        first += len(sequence.ids)
    return micro_batches
