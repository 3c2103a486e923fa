"""A few tokens through the trunk on a CPU, with results that do not depend on which tokens are computed together.

A matrix product chooses its kernel by its shape, and each kernel adds up in its own order. Here layers have kernels
whose order does not depend on the number of rows (`packed`, `quantised`). Where there are none, every product has the
same shape, eight rows. Every token attends alone. A token therefore gets bitwise the same hidden states whether it is
decoded by itself, verified as a draft token or batched with other sequences. Batching still pays, because the weights
are read once for many sequences.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

from bs_coordinator.trunk.packed import PackedLinear
from bs_coordinator.trunk.quantised import QuantisedLinear
from bs_coordinator.trunk.rotary import rotate

MAX_ROWS = 16
"""Sequences with more new tokens than this are prefill, where large products are faster."""

_PRODUCT_ROWS = 8


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer's product, [rows, out] from [rows, in]; each row as if it were computed alone."""
    # These kernels compute each row by itself (`rows_are_independent`).
    if isinstance(layer, PackedLinear):
        return layer.product(x)
    if isinstance(layer, QuantisedLinear):
        result: Tensor = layer(x)
        return result
    weight, rows = layer.weight, x.shape[0]
    if not rows:
        return x.new_empty(0, len(weight))
    if rows <= _PRODUCT_ROWS:
        return _piece(x, weight)
    return torch.cat([_piece(piece, weight) for piece in torch.split(x, _PRODUCT_ROWS)])


def rows_are_independent(layers: Sequence[nn.Linear]) -> bool:
    """Whether each row's product is bitwise the same among others as alone, by a trial with this number of threads.

    One layer of each kind and shape is tried, with up to `MAX_ROWS` rows.
    """
    generator = torch.Generator().manual_seed(0)
    by_shape = {(type(layer), layer.in_features, layer.out_features): layer for layer in layers}
    for layer in by_shape.values():
        x = torch.randn(MAX_ROWS, layer.in_features, generator=generator)
        whole = product(x, layer)
        if not all(torch.equal(product(x[:count], layer), whole[:count]) for count in range(1, MAX_ROWS)):
            return False
    return True


def _piece(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.t() for at most `_PRODUCT_ROWS` rows, as if there were that many."""
    rows = x.shape[0]
    if rows < _PRODUCT_ROWS:
        x = functional.pad(x, (0, 0, 0, _PRODUCT_ROWS - rows))
    # In this order the weights are read along their rows: twice as fast as x @ weight.t() for a large head.
    return (weight @ x.t())[:, :rows].t().contiguous()


class Rows:
    """One step of sequences with few new tokens each, computed together.

    Attributes:
        hidden: hidden states between two layers, [rows, hidden].
    """

    def __init__(
        self, modules: Any, rotary: nn.Module, ids: Sequence[Sequence[int]], caches: Sequence[DynamicCache],
        lengths: Sequence[int], *, window: int | None, parents: Sequence[Sequence[int] | None] = (),
    ) -> None:  # fmt: skip
        """Begin a step.

        Args:
            modules: of the trunk.
            rotary: the rotary embedding.
            ids: new token ids of each sequence.
            caches: of the sequences; they hold the tokens before these.
            lengths: of the sequences, where they are longer than what the caches will then hold.
            window: positions that a token attends to, its own included; None for all.
            parents: of the sequences' tokens, as in `SequenceInput`; may be left out if each follows the one before.
        """
        self._modules = modules
        # Asked once per step: modules are slow to say what they don't have.
        self._normed = hasattr(modules.layers[0].self_attn, "q_norm")
        self._caches = caches
        self._window = window
        self._counts = [len(sequence) for sequence in ids]
        past = [cache.get_seq_length() for cache in caches]
        trees = [_branches(p, count) for p, count in zip(parents or [None] * len(ids), self._counts, strict=True)]
        positions = [p + len(branch) - 1 for p, branches in zip(past, trees, strict=True) for branch in branches]
        # Of the new tokens those that one attends to, where these are not all before it.
        self._branches = [
            [torch.tensor(branch) if len(branch) <= i else None for i, branch in enumerate(branches)]
            for branches in trees
        ]
        self.hidden: Tensor = modules.embed_tokens(torch.tensor([id for sequence in ids for id in sequence]))
        by_token = [length for length, count in zip(lengths, self._counts, strict=True) for _ in range(count)]
        self._rotary = rotate(rotary, self.hidden, positions, by_token)
        self._residual = self.hidden

    def attend(self, layer: int) -> tuple[Tensor, Tensor]:
        """First half of a layer: the experts' input [rows, hidden] and the gate's probabilities [rows, experts]."""
        block = self._modules.layers[layer]
        attention = block.self_attn
        normed = block.input_layernorm(self.hidden)
        shape = (1, len(normed), -1, attention.head_dim)
        query, key, value = (
            product(normed, projection).view(shape)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if self._normed:
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = apply_rotary_pos_emb(query, key, *self._rotary, unsqueeze_dim=2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed, start = [], 0
        for cache, count, branches in zip(self._caches, self._counts, self._branches, strict=True):
            end = start + count
            new_keys, new_values = key[:, :, start:end], value[:, :, start:end]
            keys, values = cache.update(new_keys, new_values, layer)
            first = keys.shape[2] - count
            for i, branch in enumerate(branches):
                seen = first + (i + 1 if branch is None else len(branch))
                if branch is not None:
                    # For a moment only its branch follows the past, of which no copy is needed then.
                    keys[:, :, first:seen], values[:, :, first:seen] = new_keys[:, :, branch], new_values[:, :, branch]
                begin = max(0, seen - self._window) if self._window else 0
                mixed.append(
                    functional.scaled_dot_product_attention(
                        query[:, :, start + i : start + i + 1], keys[:, :, begin:seen], values[:, :, begin:seen],
                        scale=attention.scaling, enable_gqa=True,
                    )
                )  # fmt: skip
                if branch is not None:
                    keys[:, :, first:], values[:, :, first:] = new_keys, new_values
            start = end
        attended = product(torch.cat(mixed).view(len(normed), -1), attention.o_proj)
        self._residual = self.hidden + attended
        expert_input = block.post_attention_layernorm(self._residual)
        return expert_input, torch.softmax(product(expert_input, block.gate), dim=-1)

    def add(self, output: Tensor) -> None:
        """Second half of a layer: add the experts' output, [rows, hidden]."""
        self.hidden = self._residual + output

    def head(self, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), vocab] of some rows, by index."""
        return product(self._modules.norm(self.hidden[list(rows)]), self._modules.lm_head)


def _branches(parents: Sequence[int] | None, count: int) -> list[list[int]]:
    """For each of `count` new tokens those that it attends to, itself last."""
    branches: list[list[int]] = []
    for row, parent in enumerate(range(-1, count - 1) if parents is None else parents):
        branches.append([*(branches[parent] if parent >= 0 else []), row])
    return branches
