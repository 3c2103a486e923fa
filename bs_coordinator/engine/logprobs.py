"""Log-probabilities of tokens, from the model's logits. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 32
"""Rows whose exponentials are in memory at a time: 20 MB with 152,000 entries."""


class TokenLogprob(NamedTuple):
    """How probable a token was where it stands.

    Attributes:
        id: of the token.
        logprob: natural logarithm of its probability, by the softmax of the model's logits before temperature and
            `top_p`.
        top: ids of the most probable tokens there and their log-probabilities, in descending order.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: Tensor, ids: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of one token per row.

    Args:
        logits: float32 [at least len(ids), vocab] on the CPU; further rows are ignored.
        ids: the token of each row.
        top: number of most probable tokens to name for each row.
    """
    found: list[TokenLogprob] = []
    for start in range(0, len(ids), _ROWS):
        some = list(ids[start : start + _ROWS])
        rows = logits[start : start + len(some)]
        total = torch.logsumexp(rows, dim=-1, keepdim=True)
        own = (rows.gather(1, torch.tensor(some)[:, None]) - total)[:, 0].tolist()
        values, indices = rows.topk(min(top, rows.shape[1]), dim=-1)
        best = zip(indices.tolist(), (values - total).tolist(), strict=True)
        found += [
            TokenLogprob(id, logprob, tuple(zip(*named, strict=True)))
            for id, logprob, named in zip(some, own, best, strict=True)
        ]
    return found
