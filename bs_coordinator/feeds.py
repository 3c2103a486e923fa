"""What goes into a step of the model, and how it is cut into waves. Pure."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from transformers.cache_utils import DynamicCache

from bs_coordinator.trunk import Packing


class Feed(NamedTuple):
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
    """A feed, or some consecutive tokens of one.

    Attributes:
        number: of the feed in its step.
        first_token: its place among all tokens of the step, feed after feed.
    """

    number: int
    first_token: int
    feed: Feed


def cut_feeds(feeds: Sequence[Feed], *, most_tokens: int, all_logits: bool) -> list[list[Piece]]:
    """Waves of pieces: the first has a piece of every feed, each following one the next pieces of the long ones.

    Only feeds that want their last token's logits, or all, are cut, and no packed ones.

    Args:
        most_tokens: of a feed in one wave; pieces of one feed are alike in size.
        all_logits: all tokens' logits are wanted.
    """
    waves: list[list[Piece]] = [[]]
    first = 0
    for number, feed in enumerate(feeds):
        whole = feed.packing is not None or (feed.rows is not None and not all_logits)
        count = 1 if whole else max(1, math.ceil(len(feed.ids) / most_tokens))
        waves += ([] for _ in range(count - len(waves)))
        bounds = [len(feed.ids) * i // count for i in range(count + 1)]
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            last = i == count - 1
            piece = feed if count == 1 else Feed(feed.ids[start:end], feed.cache, rows=None if last else [])
            waves[i].append(Piece(number, first + start, piece))
        first += len(feed.ids)
    return waves
