"""Splits a layer's work over nodes: which rows for which experts go to which node. Pure.

Where a bundle cuts experts into slices, each slice counts as an expert here: the node's sum over its slices needs no
other arithmetic.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wire.frames import ExpertRows
from wire.tensors import Array

_ROW, _TOKEN = np.zeros(1, np.int64), np.zeros(1, np.uint32)


class Request(NamedTuple):
    """The content of one frame to one node.

    Attributes:
        rows: int64 [n], ascending indices of the layer's rows that it carries.
        experts: the rows of each expert; its token indices are positions in `rows`.
    """

    node: str
    rows: NDArray[np.int64]
    experts: tuple[ExpertRows, ...]

    def gate(self, tokens: int, experts: int) -> Array:
        """The gate weights of this request, float32 [tokens, experts] of the whole layer, zero elsewhere."""
        gate = np.zeros((tokens, experts), np.float32)
        for part in self.experts:
            gate[self.rows[part.tokens], part.expert] = part.weights
        return gate


def chosen_experts(gate: Array) -> list[int]:
    """The experts with a non-zero gate weight, float32 [tokens, experts], for some token."""
    used = gate[0] if len(gate) == 1 else gate.any(axis=0)
    chosen: list[int] = np.nonzero(used)[0].tolist()
    return chosen


def plan_requests(gate: Array, holder: Mapping[int, str], *, max_tokens: int) -> list[Request]:
    """One request per node, or several if one would hold more than `max_tokens` rows.

    Args:
        gate: float32 [tokens, experts], zero where an expert is not chosen.
        holder: the node to ask, by chosen expert.
        max_tokens: most rows of one request.
    """
    experts_of: dict[str, list[int]] = {}
    for expert in sorted(holder):
        experts_of.setdefault(holder[expert], []).append(expert)
    if len(gate) == 1:  # one-token steps are most of decoding; this takes a third of the general path's time
        weights = gate[0]
        parts_of = (
            (node, tuple(ExpertRows(e, _TOKEN, weights[e : e + 1]) for e in experts if weights[e]))
            for node, experts in sorted(experts_of.items())
        )
        return [Request(node, _ROW, parts) for node, parts in parts_of if parts]
    requests = []
    for node, experts in sorted(experts_of.items()):
        columns = [gate[:, expert] for expert in experts]
        rows = np.flatnonzero(columns[0] if len(columns) == 1 else np.any(columns, axis=0))
        for start in range(0, len(rows), max_tokens):
            some = rows[start : start + max_tokens]
            parts = [_expert_rows(expert, column[some]) for expert, column in zip(experts, columns, strict=True)]
            requests.append(Request(node, some, tuple(part for part in parts if len(part.tokens))))
    return requests


def _expert_rows(expert: int, weights: Array) -> ExpertRows:
    tokens = np.flatnonzero(weights)
    return ExpertRows(expert, tokens.astype(np.uint32), weights[tokens])
