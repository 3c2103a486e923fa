"""Which node is asked for each unit: a holder that is online and not left out, with work spread by speed.

A unit is an expert, or a slice of one where the bundle has slices (`wire.experts`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bs_coordinator.dispatch.assignment import RequestCost, assign
from bs_coordinator.dispatch.health import Health
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from bs_coordinator.selection.forecast import Float, Index
from wire.experts import UnitId, format_selector

_REVIEW_EVERY_S = 1.0
"""How often links are compared again where experts have several holders."""


class Holders:
    """The current assignment of all layers, renewed when nodes come, go, fail or recover."""

    def __init__(
        self, registry: NodeRegistry, health: Health, links: LinkMonitor, *, message_bytes: int, last_resort: bool
    ) -> None:
        """Nothing is assigned yet.

        Args:
            message_bytes: length of one hidden state on the wire, for comparing links.
            last_resort: if all holders of an expert are left out, ask one of them anyway. Without it this is done
                only where a layer has no usable expert at all. Nodes in quarantine are never asked.
        """
        self._registry = registry
        self._health = health
        self._links = links
        self._message_bytes = message_bytes
        self._assigned: list[list[str | None]] = []
        self._names: list[str] = []
        self._index: list[Index] = []
        self._available: list[NDArray[np.bool_] | None] = []
        self._last_resort = last_resort
        self._changes = (-1, -1)
        self._review_s = 0.0
        self._replicated = False

    def refresh(self, now_s: float) -> None:
        """Renew the assignment if that is due."""
        changes = (self._registry.changes, self._health.changes)
        if changes != self._changes or (self._replicated and now_s >= self._review_s):
            self._changes = changes
            self._assign(now_s)

    @property
    def names(self) -> Sequence[str]:
        """Nodes in the order in which `index` counts them."""
        return self._names

    def index(self, layer: int) -> Index:
        """intp [units]: the node to ask, as an index into `names`; meaningless where `available` is False."""
        return self._index[layer]

    def available(self, layer: int) -> NDArray[np.bool_] | None:
        """bool [units]: whether some node can be asked; None if that holds for all."""
        return self._available[layer]

    def node(self, layer: int, expert: int) -> str | None:
        """The node to ask for one unit; None if there is none."""
        return self._assigned[layer][expert]

    def others(self, layer: int, experts: Sequence[int], tried: frozenset[str]) -> dict[int, str] | None:
        """By expert a usable holder that is not in `tried`; None if one of `experts` has no such holder."""
        free = [[n for n in self._usable(UnitId(layer, e)) if n not in tried] for e in experts]
        found = assign(free, self._costs())
        named = {e: node for e, node in zip(experts, found, strict=True) if node is not None}
        return named if len(named) == len(experts) else None

    def unusable(self) -> list[UnitId]:
        """The units that are held, but by no usable node."""
        dims = self._registry.dims
        ids = (UnitId(layer, unit) for layer, unit in np.ndindex(dims.layers, dims.units))
        return [id for id in ids if self._registry.holders(id) and not self._usable(id)]

    def describe_unusable(self, ids: Sequence[UnitId]) -> str:
        """One line for people about experts without a usable holder; empty if there are none."""
        slices = self._registry.dims.slices
        nodes = sorted({node for id in ids for node in self._registry.holders(id)})
        reasons = ", ".join(f"'{node}' ({self._health.why(node)})" for node in nodes)
        return f"every node that holds {format_selector(ids, slices)} is left out for now: {reasons}" if ids else ""

    def remote_s(self) -> Float:
        """float64 [layers, experts]: predicted seconds for one hidden state to an expert's fastest usable node and
        back; the longest of its slices' where it has some; inf where there is none."""
        dims = self._registry.dims
        costs_s = {node: self._request_s(node, 1) for node in self._registry.nodes}
        remote_s = np.full((dims.layers, dims.units), np.inf)
        for layer, unit in np.ndindex(remote_s.shape):
            nodes = (node for node in self._usable(UnitId(layer, unit)) if node != LOCAL_NODE)
            remote_s[layer, unit] = min((costs_s[node] for node in nodes), default=np.inf)
        longest_s: Float = remote_s.reshape(dims.layers, dims.experts, dims.slices).max(axis=2)
        return longest_s

    def local_s(self) -> float:
        """Predicted seconds for one hidden state through an expert on the base station."""
        return self._request_s(LOCAL_NODE, 1)

    def _usable(self, id: UnitId) -> list[str]:
        return [node for node in self._registry.holders(id) if self._health.usable(node)]

    def _askable(self, holders: Sequence[Sequence[str]], *, last_resort: bool) -> list[Sequence[str]]:
        """The nodes that may be asked, by expert, from its holders."""
        # A layer of 128 experts has far fewer sets of holders than experts.
        found: dict[Sequence[str], Sequence[str]] = {}
        for nodes in holders:
            if nodes not in found:
                found[nodes] = self._askable_of(nodes, last_resort=last_resort)
        return [found[nodes] for nodes in holders]

    def _askable_of(self, holders: Sequence[str], *, last_resort: bool) -> Sequence[str]:
        health = self._health
        if usable := [node for node in holders if health.usable(node)]:
            return usable
        # Silence of the whole network is not their fault: asking them is the best that can be done.
        left_out = [node for node in holders if not health.quarantined(node)]
        return [node for node in left_out if health.doubted(node)] or (left_out if last_resort else [])

    def _costs(self) -> dict[str, RequestCost]:
        nodes = (*self._registry.nodes, LOCAL_NODE)
        return {node: RequestCost.of(self._request_s(node, 1), self._request_s(node, 2)) for node in nodes}

    def _request_s(self, node: str, experts: int) -> float:
        """Predicted seconds of a request for so many experts, with a hidden state for each."""
        size = 0 if node == LOCAL_NODE else experts * self._message_bytes
        return self._links.predict_s(node, down_bytes=size, up_bytes=size, experts=experts, rows=experts)

    def _assign(self, now_s: float) -> None:
        dims = self._registry.dims
        costs = self._costs()
        before = self._assigned
        self._assigned, self._replicated = [], False
        for layer in range(dims.layers):
            holders = [self._registry.holders(UnitId(layer, unit)) for unit in range(dims.units)]
            askable = self._askable(holders, last_resort=self._last_resort)
            if not any(askable):  # there is nothing to lose
                askable = self._askable(holders, last_resort=True)
            self._replicated |= any(len(nodes) > 1 for nodes in askable)
            self._assigned.append(assign(askable, costs, before[layer] if before else None))
        self._names = sorted({name for row in self._assigned for name in row if name is not None}) or [""]
        index = {name: i for i, name in enumerate(self._names)}
        self._index = [np.array([index.get(name or "", 0) for name in row], np.intp) for row in self._assigned]
        present = [np.array([name is not None for name in row]) for row in self._assigned]
        self._available = [None if row.all() else row for row in present]
        self._review_s = now_s + _REVIEW_EVERY_S
