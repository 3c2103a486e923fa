"""The input of a step of the model, and how it is cut into micro-batches. Pure."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers.cache_utils import DynamicCache


class Packing(NamedTuple):
    """Several sequences packed into one, so that many short ones take few large products.

    Attributes:
        positions: int64 [tokens], of each token within its own sequence.
        visible: bool [tokens, past + tokens], the positions that each token attends to: itself and all before it in
            its sequence.
    """

    positions: Tensor
    visible: Tensor


class SequenceInput(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        ids: token ids that follow what the cache holds.
        cache: the sequence's KV cache.
        packing: where the ids are in fact several sequences.
        rows: indices of the tokens whose logits are wanted; None for the last token's.
        length: of the sequence, if more of its tokens are known than these. With some kinds of rotary embedding, tokens
            depend on it.
        prompt: the tokens belong to a prompt, although `rows` names some of them.
        parents: for each token the index of the one that it follows, -1 for the last one in the cache; None if each
            follows the one before it. Only a `batch_invariant` trunk takes these, for at most `rows.MAX_ROWS` tokens;
            `kv_cache.keep_branch` then makes the cache hold a single sequence again.
    """

    ids: list[int]
    cache: DynamicCache
    packing: Packing | None = None
    rows: list[int] | None = None
    length: int = 0
    prompt: bool = False
    parents: list[int] | None = None

    @property
    def wanted(self) -> list[int]:
        """Indices of the tokens whose logits are wanted, unless all are."""
        return [-1] if self.rows is None else self.rows


class Piece(NamedTuple):
    """A sequence's input, or consecutive tokens of it.

    Attributes:
        number: index of the sequence in its step.
        first_token: index of the first token among all tokens of the step, sequence after sequence.
        inputs: the tokens.
    """

    number: int
    first_token: int
    inputs: SequenceInput


def cut_inputs(inputs: Sequence[SequenceInput], *, most_tokens: int, all_logits: bool) -> list[list[Piece]]:
    """Cut inputs into micro-batches: the first holds a piece of each sequence, the others further pieces of long ones.

    Packed inputs and inputs that want the logits of certain rows are not cut.

    Args:
        inputs: of the step.
        most_tokens: of a sequence in one micro-batch. Pieces of one sequence differ by at most one token in size.
        all_logits: whether all tokens' logits are wanted.
    """
    micro_batches: list[list[Piece]] = [[]]
    first = 0
    for number, sequence in enumerate(inputs):
        whole = sequence.packing is not None or (sequence.rows is not None and not all_logits)
        count = 1 if whole else max(1, math.ceil(len(sequence.ids) / most_tokens))
        micro_batches += ([] for _ in range(count - len(micro_batches)))
        length = sequence.length or sequence.cache.get_seq_length() + len(sequence.ids)
        bounds = [len(sequence.ids) * i // count for i in range(count + 1)]
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            last = i == count - 1
            piece = (
                sequence
                if count == 1
                else SequenceInput(sequence.ids[start:end], sequence.cache, rows=None if last else [], length=length)
            )
            micro_batches[i].append(Piece(number, first + start, piece))
        first += len(sequence.ids)
    return micro_batches
