"""Which node holds which expert, or which slice of one, according to the nodes' status documents. No I/O."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import msgspec

from wire.experts import UnitId, format_selector
from wire.manifest import Dims
from wire.status import FRAME_TAGS, NodeStatus

LOCAL_NODE = "@bs"
"""Name of the base station itself as the holder of its local experts. No node can have this name."""


class NodeRegistry:
    """The nodes of a cluster. All getters return snapshots, which later changes do not affect.

    Attributes:
        dims: of the model.
        changes: increases whenever an expert's holders may have changed.
    """

    def __init__(self, dims: Dims, model_sha256: str, *, tagged: bool | None = None) -> None:
        """A registry without nodes.

        Args:
            dims: of the model.
            model_sha256: hash of the model; nodes with experts of another model are ignored.
            tagged: whether the base station's frames carry tags; nodes where it is otherwise are ignored. None to take
                any node.
        """
        self.dims = dims
        self.changes = 0
        self._model_sha256 = model_sha256
        self._tagged = tagged
        # Replaced on each change and never changed in place: a snapshot costs nothing.
        self._nodes: Mapping[str, NodeStatus] = {}
        self._ignored: Mapping[str, str] = {}
        self._held: dict[str, Collection[UnitId]] = {}
        self._holders: dict[UnitId, tuple[str, ...]] = {}

    def apply(self, status: NodeStatus) -> bool:
        """Take in a status document.

        Returns:
            True if answers to earlier requests are now impossible, because the node went offline or restarted.
        """
        if status.refused:
            return False  # from a process that was refused this node's name
        node = status.node
        known = self._nodes.get(node)
        gone = known is not None and (not status.online or status.boot_id != known.boot_id)
        nodes = {name: other for name, other in self._nodes.items() if name != node}
        ignored = {name: why for name, why in self._ignored.items() if name != node}
        if status.online and status.holding and status.holding.model_sha256 != self._model_sha256:
            ignored[node] = "its experts were cut from another checkpoint"
        elif status.online and status.holding and status.holding.dims != self.dims:
            # Before its selector is expanded: only that of the model's own dimensions is a bounded amount of work.
            ignored[node] = self._other_dims(status.holding.dims)
        elif status.online and (why := self._other_tags(status)):
            ignored[node] = why
        elif status.online:
            # Keeps its place among the others if it was known.
            nodes = {**self._nodes, node: status}
        self.changes += gone or ignored != self._ignored
        self._nodes, self._ignored = nodes, ignored
        if node not in nodes:
            self._hold(node, ())
        elif known is None or known.holding != status.holding:
            self._hold(node, status.unit_ids())
        return gone

    def forget(self) -> None:
        """Consider all nodes offline."""
        self._nodes = {}
        for node in self._held.keys() - {LOCAL_NODE}:
            self._hold(node, ())

    def hold_locally(self, ids: frozenset[UnitId]) -> None:
        """From now on the base station itself holds these experts, and no others."""
        self._hold(LOCAL_NODE, ids)

    @property
    def local_experts(self) -> frozenset[UnitId]:
        """The units that the base station itself holds."""
        return frozenset(self._held.get(LOCAL_NODE, ()))

    @property
    def nodes(self) -> Mapping[str, NodeStatus]:
        """The last status of each node that is online and serves this model, by name."""
        return MappingProxyType(self._nodes)

    @property
    def ignored(self) -> Mapping[str, str]:
        """The nodes that are online but can't be used, such as those of another model, and why."""
        return MappingProxyType(self._ignored)

    def boot_id(self, node: str) -> str:
        """The boot id of the last status of a node; empty if it is not among `nodes`."""
        known = self._nodes.get(node)
        return known.boot_id if known else ""

    def batch_variant(self) -> list[str]:
        """Names of the nodes that found their results to depend on which tokens are computed together."""
        return sorted(n for n, s in self._nodes.items() if s.device and s.device.batch_invariant is False)

    def holders(self, id: UnitId) -> Sequence[str]:
        """The holders of a unit: `LOCAL_NODE` first, then nodes with the fewest experts to serve, then by name.

        The order depends only on which nodes are online.
        """
        return self._holders.get(id, ())

    def node_at(self, endpoint: str) -> str | None:
        """The node whose connection to the broker has this local endpoint (`address:port`), if a node reports it."""
        return next((n for n, s in self._nodes.items() if s.uplink and s.uplink.endpoint == endpoint), None)

    def missing(self) -> list[UnitId]:
        """Units of the model without a holder."""
        dims = self.dims
        every = (UnitId(layer, unit) for layer in range(dims.layers) for unit in range(dims.units))
        return [id for id in every if id not in self._holders]

    def describe_missing(self) -> str:
        """One line for people: which experts are missing, which nodes are online, and what to do."""
        missing = format_selector(self.missing(), self.dims.slices)
        online = ", ".join(sorted(self._nodes)) or "none"
        ignored = "".join(f"; ignored {node}: {why}" for node, why in sorted(self._ignored.items()))
        return (
            f"no node holds {missing} (online: {online}{ignored}): "
            f"start 'wdmoe-node … --experts \"{missing}\"' on a device"
        )

    def _other_dims(self, dims: Dims) -> str:
        """Why a node of this model can't be used, whose dimensions differ."""
        if dims.slices != self.dims.slices and msgspec.structs.replace(dims, slices=self.dims.slices) == self.dims:
            cut = "whole" if dims.slices == 1 else f"in {dims.slices} slices"
            ours = "whole" if self.dims.slices == 1 else f"cut into {self.dims.slices} slices"
            return f"its experts are {cut}, those of the base station's bundle {ours}"
        return "its experts have other dimensions than the model of its hash"

    def _other_tags(self, status: NodeStatus) -> str:
        """Why a node's frames can't be exchanged with it because of their tags; empty if they can."""
        if self._tagged is None or status.frame_tags == (FRAME_TAGS if self._tagged else 0):
            return ""
        if not self._tagged:
            return "its frames carry tags: give the base station --cluster-key"
        if status.frame_tags:
            return "its frames carry tags of another version: update it or the base station"
        return "its frames carry no tags, or those of an older version: give it --frame-key, or update it"

    def _hold(self, node: str, ids: Collection[UnitId]) -> None:
        """From now on a node holds these experts. Only their entries change, so that a status costs little."""
        before = self._held.pop(node, ())
        if not before and not ids:
            return
        for id in before:
            others = tuple(other for other in self._holders[id] if other != node)
            if others:
                self._holders[id] = others
            else:
                del self._holders[id]
        if ids:
            self._held[node] = ids
            for id in ids:
                self._holders[id] = tuple(sorted((*self._holders.get(id, ()), node), key=self._order))
        self.changes += 1

    def _order(self, node: str) -> tuple[bool, int, str]:
        return node != LOCAL_NODE, len(self._held[node]), node
