"""One forward step of the distributed model: trunk here, experts wherever they are."""

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bs_coordinator.forecast import LayerForecast
from bs_coordinator.records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.selection import Policy
from bs_coordinator.selection.degraded import select_available
from bs_coordinator.selection.demand import predicted_s
from bs_coordinator.trunk import Packing, Trunk
from bs_coordinator.trunk_rows import MAX_ROWS, Rows
from wire.errors import ExpertsLostError
from wire.tensors import Array

if TYPE_CHECKING:
    from bs_coordinator.trunk_graphs import GraphedDecoder


class ExpertOutput(NamedTuple):
    """What the experts of one layer made of some tokens.

    Attributes:
        output: float32 [tokens, hidden], Σ over experts of gate weight × expert output.
        dispatches: one record per request to a node.
    """

    output: Array
    dispatches: tuple[DispatchRecord, ...] = ()


class Experts(Protocol):
    """All experts of a model, wherever they run."""

    def apply(self, layer: int, hidden: Array, gate: Array) -> ExpertOutput:
        """Combine the chosen experts of a layer.

        Args:
            hidden: float32 [tokens, hidden].
            gate: float32 [tokens, experts], zero where an expert is not chosen.

        Raises:
            WdmoeError: an expert could not be had.
        """

    def forecast(self, layer: int) -> LayerForecast:
        """What asking for this layer's experts is predicted to cost now."""


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


class DistributedMixtral:
    """A Mixtral whose experts are elsewhere.

    Attributes:
        policy: how experts are chosen; may be replaced between steps.
        degrade: go on with the next best experts where some are lost, instead of giving up; tokens that this
            changes are named in the step's record.
    """

    def __init__(self, trunk: Trunk, experts: Experts, policy: Policy, *, degrade: bool = False) -> None:
        self.trunk = trunk
        self._experts = experts
        self.policy = policy
        self.degrade = degrade

    @torch.inference_mode()
    def step(self, feeds: Sequence[Feed], *, all_logits: bool = False) -> tuple[list[Tensor], StepRecord]:
        """Run several sequences one step on, with one round of expert requests per layer for all of them.

        Returns:
            Per feed logits in fp32 on the CPU, [1, vocab] of its last token, [tokens, vocab] with `all_logits`, or
            [rows, vocab] of the rows that it names; and what the step cost. On an error the caches are cut back to
            what they held.
        """
        past = [feed.cache.get_seq_length() for feed in feeds]
        try:
            return self._step(feeds, past[0], all_logits)
        except BaseException:
            # Layers before the failure have already appended their keys and values.
            for feed, length in zip(feeds, past, strict=True):
                self.trunk.truncate(feed.cache, length)
            raise

    def _step(self, feeds: Sequence[Feed], position: int, all_logits: bool) -> tuple[list[Tensor], StepRecord]:
        began_ns = time.perf_counter_ns()
        passage = self._begin(feeds)
        mark_ns = time.perf_counter_ns()
        head_ns = mark_ns - began_ns
        layers: list[LayerRecord] = []
        for layer in range(self.trunk.layers):
            # A GPU is at this layer already. What does not need its result is done before waiting for it.
            forecast = self._experts.forecast(layer)
            x, probabilities = passage.attend(layer)
            choice = self._choose(probabilities, forecast)
            attended_ns = time.perf_counter_ns()
            combined, choice = self._apply(layer, x, probabilities, choice)
            passage.add(combined.output)
            done_ns = time.perf_counter_ns()
            layers.append(
                LayerRecord(
                    layer=layer,
                    trunk_ns=attended_ns - mark_ns,
                    dispatch_ns=done_ns - attended_ns,
                    pairs=int(np.count_nonzero(choice.gate)),
                    predicted_ns=int(1e9 * predicted_s(choice.gate > 0, choice.forecast)),
                    dispatches=combined.dispatches,
                    degraded=choice.degraded,
                )
            )
            mark_ns = done_ns
        logits = passage.logits(all_logits)
        end_ns = time.perf_counter_ns()
        tokens = sum(len(feed.ids) for feed in feeds)
        record = StepRecord(
            phase="decode" if all(len(feed.ids) == 1 or feed.rows for feed in feeds) else "prefill",
            position=position,
            tokens=tokens,
            total_ns=end_ns - began_ns,
            head_ns=head_ns + end_ns - mark_ns,
            layers=tuple(layers),
        )
        return logits, record

    def _begin(self, feeds: Sequence[Feed]) -> "_Passage":
        """Neighbours with few tokens together, where this trunk runs them so; in the order of the feeds."""
        if len(feeds) == 1 and feeds[0].packing is None and (graphs := self.trunk.graphs(feeds[0].ids, feeds[0].cache)):
            return _TokenPassage(graphs, feeds[0])
        passages: list[_Passage] = []
        for few, group in itertools.groupby(feeds, lambda f: len(f.ids) <= MAX_ROWS and f.packing is None):
            some = list(group)
            rows = self.trunk.rows([f.ids for f in some], [f.cache for f in some]) if few else None
            passages.append(_RowsPassage(rows, some) if rows else _BlocksPassage(self.trunk, some))
        return passages[0] if len(passages) == 1 else _JointPassage(passages)

    def _choose(self, probabilities: Array, forecast: LayerForecast) -> "_Choice":
        if not self.degrade:
            return _Choice(self.policy.select(probabilities, forecast), forecast, ())
        gate, degraded = select_available(self.policy, probabilities, forecast)
        return _Choice(gate, forecast, tuple(degraded.tolist()))

    def _apply(self, layer: int, x: Array, probabilities: Array, choice: "_Choice") -> tuple[ExpertOutput, "_Choice"]:
        """Ask the experts, and where some are lost choose again among those that are left."""
        # Each turn loses at least one node, and a layer has no more of them than experts.
        for _ in range(probabilities.shape[1]):
            try:
                return self._experts.apply(layer, x, choice.gate), choice
            except ExpertsLostError:
                if not self.degrade:
                    raise
            choice = self._choose(probabilities, self._experts.forecast(layer))
        return self._experts.apply(layer, x, choice.gate), choice


class _Passage(Protocol):
    """Some sequences' new tokens on their way through the trunk."""

    def attend(self, layer: int) -> tuple[Array, Array]:
        """The experts' input [tokens, hidden] and the gate's probabilities [tokens, experts], fp32 on the host."""

    def add(self, output: Array) -> None:
        """What the experts made of it, float32 [tokens, hidden]."""

    def logits(self, all_logits: bool) -> list[Tensor]:
        """Per feed, as `DistributedMixtral.step` returns them."""


class _RowsPassage:
    """Sequences with few new tokens each, on their way through the trunk together."""

    def __init__(self, rows: Rows, feeds: Sequence[Feed]) -> None:
        self._rows = rows
        self._feeds = feeds

    def attend(self, layer: int) -> tuple[Array, Array]:
        x, probabilities = self._rows.attend(layer)
        return x.numpy(), probabilities.numpy()

    def add(self, output: Array) -> None:
        self._rows.add(torch.from_numpy(output))

    def logits(self, all_logits: bool) -> list[Tensor]:
        wanted, start = [], 0
        for feed in self._feeds:
            count = len(feed.ids)
            local = range(count) if all_logits else (row % count for row in feed.rows or [-1])
            wanted.append([start + row for row in local])
            start += count
        logits = self._rows.head([row for rows in wanted for row in rows])
        return list(torch.split(logits, [len(rows) for rows in wanted]))


class _TokenPassage:
    """One token of one sequence on its way through captured graphs."""

    def __init__(self, graphs: "GraphedDecoder", feed: Feed) -> None:
        self._graphs = graphs
        self._layer = 0
        graphs.begin(feed.ids[0], feed.cache)

    def attend(self, layer: int) -> tuple[Array, Array]:
        self._layer = layer
        return self._graphs.attend(layer)

    def add(self, output: Array) -> None:
        self._graphs.add(self._layer, output)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [self._graphs.head()]


class _BlocksPassage:
    """Sequences on their way through transformers' own blocks, one by one."""

    def __init__(self, trunk: Trunk, feeds: Sequence[Feed]) -> None:
        self._trunk = trunk
        self._feeds = feeds
        begun = [trunk.embed(torch.tensor(feed.ids), feed.cache, feed.packing) for feed in feeds]
        self._hidden, self._contexts = [h for h, _ in begun], [c for _, c in begun]

    def attend(self, layer: int) -> tuple[Array, Array]:
        attended = [self._trunk.attend(layer, h, c) for h, c in zip(self._hidden, self._contexts, strict=True)]
        self._hidden = [residual for residual, _, _ in attended]
        # The copies to the host also wait for a GPU, so that the clock after them is honest.
        return _to_host([x for _, x, _ in attended]), _to_host([p for _, _, p in attended])

    def add(self, output: Array) -> None:
        moved = torch.from_numpy(output).to(self._trunk.device, self._trunk.dtype)
        parts = torch.split(moved, [len(feed.ids) for feed in self._feeds])
        self._hidden = [residual + part[None] for residual, part in zip(self._hidden, parts, strict=True)]

    def logits(self, all_logits: bool) -> list[Tensor]:
        # One product for all sequences: the head's weights are the largest in the trunk and are read once.
        wanted = [h if all_logits else h[:, f.rows or [-1]] for h, f in zip(self._hidden, self._feeds, strict=True)]
        return list(torch.split(self._trunk.head(torch.cat(wanted, dim=1)).cpu(), [h.shape[1] for h in wanted]))


class _JointPassage:
    """Several passages, whose experts are asked together."""

    def __init__(self, passages: Sequence[_Passage]) -> None:
        self._passages = passages
        self._ends: list[int] = []

    def attend(self, layer: int) -> tuple[Array, Array]:
        attended = [passage.attend(layer) for passage in self._passages]
        self._ends = list(itertools.accumulate(len(x) for x, _ in attended))
        return np.concatenate([x for x, _ in attended]), np.concatenate([p for _, p in attended])

    def add(self, output: Array) -> None:
        for passage, part in zip(self._passages, np.split(output, self._ends[:-1]), strict=True):
            passage.add(part)

    def logits(self, all_logits: bool) -> list[Tensor]:
        return [logits for passage in self._passages for logits in passage.logits(all_logits)]


class _Choice(NamedTuple):
    """Gate weights float32 [tokens, experts], what they were chosen by, and which tokens lost experts."""

    gate: Array
    forecast: LayerForecast
    degraded: tuple[int, ...]


def _to_host(tensors: list[Tensor]) -> Array:
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    array: Array = joined.float().cpu().numpy()
    return array
