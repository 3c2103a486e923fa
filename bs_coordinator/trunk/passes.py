"""Ways through the trunk: rows on a CPU, captured graphs on a GPU, or transformers' own blocks.

`start_pass` decides which way some sequences take."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from bs_coordinator.trunk.inputs import SequenceInput
from bs_coordinator.trunk.rows import MAX_ROWS, Rows
from bs_coordinator.trunk.trunk import Trunk
from wire.tensors import Array

if TYPE_CHECKING:
    from bs_coordinator.trunk.cuda_graph import GraphedDecoder


def start_pass(trunk: Trunk, inputs: Sequence[SequenceInput]) -> "TrunkPass":
    """Neighbours with few tokens together, where this trunk runs them so; in the order of the inputs."""
    if len(inputs) == 1 and inputs[0].packing is None and (graphs := trunk.graphs(inputs[0].ids, inputs[0].cache)):
        return TokenPass(graphs, inputs[0])
    passes: list[TrunkPass] = []
    for few, group in itertools.groupby(inputs, lambda f: len(f.ids) <= MAX_ROWS and f.packing is None):
        some = list(group)
        rows = trunk.rows([f.ids for f in some], [f.cache for f in some]) if few else None
        passes.append(RowsPass(rows, some) if rows else BlocksPass(trunk, some))
    return passes[0] if len(passes) == 1 else JointPass(passes)


class TrunkPass(Protocol):
    """Some sequences' new tokens on their way through the trunk."""

    def attend(self, layer: int) -> tuple[Array, Array]:
        """The experts' input [tokens, hidden] and the gate's probabilities [tokens, experts], fp32 on the host."""

    def add(self, output: Array) -> None:
        """What the experts made of it, float32 [tokens, hidden]."""

    def logits(self, all_logits: bool) -> list[Tensor]:
        """Per input_, as `DistributedMixtral.step` returns them."""

    def abandon(self) -> None:
        """Give up half-way."""
        return


class RowsPass(TrunkPass):
    """Sequences with few new tokens each, on their way through the trunk together."""

    def __init__(self, rows: Rows, inputs: Sequence[SequenceInput]) -> None:
        self._rows = rows
        self._feeds = inputs

    def attend(self, layer: int) -> tuple[Array, Array]:
        x, probabilities = self._rows.attend(layer)
        return x.numpy(), probabilities.numpy()

    def add(self, output: Array) -> None:
        self._rows.add(torch.from_numpy(output))

    def logits(self, all_logits: bool) -> list[Tensor]:
        wanted, start = [], 0
        for input_ in self._feeds:
            count = len(input_.ids)
            local = range(count) if all_logits else (row % count for row in input_.wanted)
            wanted.append([start + row for row in local])
            start += count
        logits = self._rows.head([row for rows in wanted for row in rows])
        return list(torch.split(logits, [len(rows) for rows in wanted]))


class TokenPass(TrunkPass):
    """One token of one sequence on its way through captured graphs."""

    def __init__(self, graphs: "GraphedDecoder", input_: SequenceInput) -> None:
        self._graphs = graphs
        self._layer = 0
        graphs.begin(input_.ids[0], input_.cache)

    def attend(self, layer: int) -> tuple[Array, Array]:
        self._layer = layer
        return self._graphs.attend(layer)

    def add(self, output: Array) -> None:
        self._graphs.add(self._layer, output)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [self._graphs.head()]

    def abandon(self) -> None:
        self._graphs.abandon()


class BlocksPass(TrunkPass):
    """Sequences on their way through transformers' own blocks, one by one."""

    def __init__(self, trunk: Trunk, inputs: Sequence[SequenceInput]) -> None:
        self._trunk = trunk
        self._feeds = inputs
        begun = [trunk.embed(torch.tensor(input_.ids), input_.cache, input_.packing) for input_ in inputs]
        self._hidden, self._contexts = [h for h, _ in begun], [c for _, c in begun]

    def attend(self, layer: int) -> tuple[Array, Array]:
        attended = [self._trunk.attend(layer, h, c) for h, c in zip(self._hidden, self._contexts, strict=True)]
        self._hidden = [residual for residual, _, _ in attended]
        # The copies to the host also wait for a GPU, so that the clock after them is honest.
        return _to_host([x for _, x, _ in attended]), _to_host([p for _, _, p in attended])

    def add(self, output: Array) -> None:
        moved = torch.from_numpy(output).to(self._trunk.device, self._trunk.dtype)
        parts = torch.split(moved, [len(input_.ids) for input_ in self._feeds])
        self._hidden = [residual + part[None] for residual, part in zip(self._hidden, parts, strict=True)]

    def logits(self, all_logits: bool) -> list[Tensor]:
        # One product for all sequences: the head's weights are the largest in the trunk and are read once.
        wanted = [h if all_logits else h[:, f.wanted] for h, f in zip(self._hidden, self._feeds, strict=True)]
        counts = [h.shape[1] for h in wanted]
        if not sum(counts):
            return [torch.empty(0, self._trunk.config.vocab_size)] * len(counts)
        return list(torch.split(self._trunk.head(torch.cat(wanted, dim=1)).cpu(), counts))


class JointPass(TrunkPass):
    """Several passes, whose experts are asked together."""

    def __init__(self, passes: Sequence[TrunkPass]) -> None:
        self._passages = passes
        self._ends: list[int] = []

    def attend(self, layer: int) -> tuple[Array, Array]:
        attended = [trunk_pass.attend(layer) for trunk_pass in self._passages]
        self._ends = list(itertools.accumulate(len(x) for x, _ in attended))
        return np.concatenate([x for x, _ in attended]), np.concatenate([p for _, p in attended])

    def add(self, output: Array) -> None:
        for trunk_pass, part in zip(self._passages, np.split(output, self._ends[:-1]), strict=True):
            trunk_pass.add(part)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [logits for trunk_pass in self._passages for logits in trunk_pass.logits(all_logits)]


def _to_host(tensors: list[Tensor]) -> Array:
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    array: Array = joined.float().cpu().numpy()
    return array
