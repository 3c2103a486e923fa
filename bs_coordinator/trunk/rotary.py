"""Rotary embedding whose frequencies may depend on how long a sequence is.

With dynamic NTK scaling and LongRoPE, transformers takes the frequencies by the longest position of a call, and keeps
some of them for the next call. Here each token gets those of its own sequence, whatever is computed with it.

Source: transformers' `modeling_rope_utils.dynamic_rope_update`; LongRoPE: Ding et al. 2024, arXiv:2402.13753.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def depends_on_length(rotary: Any) -> bool:
    """Whether the frequencies of this rotary embedding depend on the length of the sequence."""
    return "dynamic" in rotary.rope_type or rotary.rope_type == "longrope"


def rotate(rotary: Any, hidden: Tensor, positions: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of tokens, [1, tokens, head size] each.

    Args:
        rotary: transformers' rotary embedding.
        hidden: a tensor of the type and on the device of the result.
        positions: of each token in its sequence.
        lengths: of each token's sequence, at least; a sequence is as long as its tokens' positions need.
    """
    found: tuple[Tensor, Tensor]
    if not depends_on_length(rotary):
        # Of the class: an instance's own may call this function (`trunk.generic`).
        found = type(rotary).forward(rotary, hidden, position_ids=torch.tensor([positions], device=hidden.device))
        return found
    tables = [_table(rotary, hidden, max(n, p + 1), p) for p, n in zip(positions, lengths, strict=True)]
    return torch.cat([cos for cos, _ in tables], dim=1), torch.cat([sin for _, sin in tables], dim=1)


def _table(rotary: Any, hidden: Tensor, length: int, position: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of one token in a sequence of `length` tokens."""
    # The frequencies of an earlier call must not be kept for a shorter sequence.
    rotary.max_seq_len_cached = rotary.original_max_seq_len
    rotary.inv_freq = rotary.original_inv_freq.to(hidden.device, copy=True)
    positions = torch.tensor([[position, length - 1]], device=hidden.device)
    cos, sin = type(rotary).forward(rotary, hidden, position_ids=positions)
    return cos[:, :1], sin[:, :1]
