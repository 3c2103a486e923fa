"""The ways through `LlamaTrunk`: rows on a CPU, captured graphs on a GPU, or transformers' own blocks."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bs_coordinator.selection.routing import Routing, join_routings
from bs_coordinator.trunk.inputs import Packing, SequenceInput
from bs_coordinator.trunk.interface import TrunkPass
from bs_coordinator.trunk.rows import Rows
from wire.tensors import Array

if TYPE_CHECKING:
    from bs_coordinator.trunk.cuda_graph import GraphedDecoder

Rule = Callable[[Array], Routing]
"""A model's routing of tokens by the gate's probabilities, float32 [tokens, experts]."""


class Blocks(Protocol):
    """A model that is run layer by layer, as `LlamaTrunk` documents it."""

    config: Any
    device: torch.device
    dtype: torch.dtype

    def route(self, probabilities: Array) -> Routing: ...

    def embed(
        self, ids: Tensor, cache: DynamicCache, packing: Packing | None = None, *, length: int = 0
    ) -> tuple[Tensor, Any]: ...

    def attend(self, layer: int, hidden: Tensor, step: Any) -> tuple[Tensor, Tensor, Tensor]: ...

    def head(self, hidden: Tensor) -> Tensor: ...


class RowsPass(TrunkPass):
    """Sequences with few new tokens each, together, with results that do not depend on the batch."""

    def __init__(self, rows: Rows, inputs: Sequence[SequenceInput], route: Rule) -> None:
        self._rows = rows
        self._route = route
        self._inputs = inputs

    def attend(self, layer: int) -> tuple[Array, Routing]:
        hidden, probabilities = self._rows.attend(layer)
        return hidden.numpy(), self._route(probabilities.numpy())

    def add(self, output: Array) -> None:
        self._rows.add(torch.from_numpy(output))

    def logits(self, all_logits: bool) -> list[Tensor]:
        wanted, start = [], 0
        for sequence in self._inputs:
            count = len(sequence.ids)
            local = range(count) if all_logits else (row % count for row in sequence.wanted)
            wanted.append([start + row for row in local])
            start += count
        logits = self._rows.head([row for rows in wanted for row in rows])
        return list(torch.split(logits, [len(rows) for rows in wanted]))


class GraphsPass(TrunkPass):
    """A few tokens of one or more sequences, through captured graphs."""

    def __init__(self, graphs: "GraphedDecoder", inputs: Sequence[SequenceInput], route: Rule) -> None:
        self._graphs = graphs
        self._route = route
        self._inputs = inputs
        self._layer = 0
        graphs.begin([sequence.ids for sequence in inputs], [sequence.cache for sequence in inputs])

    def attend(self, layer: int) -> tuple[Array, Routing]:
        self._layer = layer
        hidden, probabilities = self._graphs.attend(layer)
        return hidden, self._route(probabilities)

    def add(self, output: Array) -> None:
        self._graphs.add(self._layer, output)

    def logits(self, all_logits: bool) -> list[Tensor]:
        logits = torch.split(self._graphs.head(), [len(sequence.ids) for sequence in self._inputs])
        if all_logits:
            return list(logits)
        return [found[s.wanted] for found, s in zip(logits, self._inputs, strict=True)]

    def abandon(self) -> None:
        self._graphs.abandon()


class BlocksPass(TrunkPass):
    """Sequences through transformers' own blocks, one after the other."""

    def __init__(self, blocks: Blocks, inputs: Sequence[SequenceInput]) -> None:
        self._blocks = blocks
        self._inputs = inputs
        begun = [blocks.embed(torch.tensor(s.ids), s.cache, s.packing, length=s.length) for s in inputs]
        self._hidden, self._contexts = [h for h, _ in begun], [c for _, c in begun]

    def attend(self, layer: int) -> tuple[Array, Routing]:
        attended = [self._blocks.attend(layer, h, c) for h, c in zip(self._hidden, self._contexts, strict=True)]
        self._hidden = [residual for residual, _, _ in attended]
        # The copies to the host also wait for a GPU, so a clock read after them includes its work.
        hidden, probabilities = _to_host([x for _, x, _ in attended]), _to_host([p for _, _, p in attended])
        return hidden, self._blocks.route(probabilities)

    def add(self, output: Array) -> None:
        moved = torch.from_numpy(output).to(self._blocks.device, self._blocks.dtype)
        parts = torch.split(moved, [len(sequence.ids) for sequence in self._inputs])
        self._hidden = [residual + part[None] for residual, part in zip(self._hidden, parts, strict=True)]

    def logits(self, all_logits: bool) -> list[Tensor]:
        # One product for all sequences: the head's weights are the largest in the trunk and are read only once.
        wanted = [h if all_logits else h[:, s.wanted] for h, s in zip(self._hidden, self._inputs, strict=True)]
        counts = [h.shape[1] for h in wanted]
        if not sum(counts):
            return [torch.empty(0, self._blocks.config.vocab_size)] * len(counts)
        return list(torch.split(self._blocks.head(torch.cat(wanted, dim=1)).cpu(), counts))


class JointPass(TrunkPass):
    """Several passes whose experts are asked together."""

    def __init__(self, passes: Sequence[TrunkPass]) -> None:
        self._passes = passes
        self._ends: list[int] = []

    def attend(self, layer: int) -> tuple[Array, Routing]:
        attended = [trunk_pass.attend(layer) for trunk_pass in self._passes]
        self._ends = list(itertools.accumulate(len(x) for x, _ in attended))
        return np.concatenate([x for x, _ in attended]), join_routings([r for _, r in attended])

    def add(self, output: Array) -> None:
        for trunk_pass, part in zip(self._passes, np.split(output, self._ends[:-1]), strict=True):
            trunk_pass.add(part)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [logits for trunk_pass in self._passes for logits in trunk_pass.logits(all_logits)]

    def meanwhile(self) -> None:
        for trunk_pass in self._passes:
            trunk_pass.meanwhile()

    def abandon(self) -> None:
        for trunk_pass in self._passes:
            trunk_pass.abandon()


def _to_host(tensors: list[Tensor]) -> Array:
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    array: Array = joined.float().cpu().numpy()
    return array
