"""Which node holds which expert, as the nodes' status documents tell it: state and questions, no I/O."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from wire.experts import ExpertId, format_selector
from wire.manifest import Dims
from wire.status import NodeStatus

LOCAL_NODE = "@bs"
"""The base station itself, as the holder of experts that it keeps. No node can have this name."""


class NodeRegistry:
    """The nodes of a cluster.

    Attributes:
        dims: of the model.
        changes: grows whenever some expert's holders may be others than before.
    """

    def __init__(self, dims: Dims, model_sha256: str) -> None:
        self._ignored: dict[str, str] = {}
        self.changes = 0
        self.dims = dims
        self._model_sha256 = model_sha256
        # Replaced at every change, never changed, so that `nodes` needs no copy.
        self._nodes: Mapping[str, NodeStatus] = MappingProxyType({})
        self._local: frozenset[ExpertId] = frozenset()
        self._holders: Mapping[ExpertId, list[str]] = {}

    def apply(self, status: NodeStatus) -> bool:
        """Take in a status; True when it makes answers to earlier requests impossible: the node went offline
        or was restarted."""
        if status.refused:
            return False  # a process that never was the node of this name
        known = self._nodes.get(status.node)
        gone = known is not None and (not status.online or status.boot_id != known.boot_id)
        self._ignored.pop(status.node, None)
        if status.online and status.holding and status.holding.model_sha256 != self._model_sha256:
            self._ignored[status.node] = "its experts were cut from another checkpoint"
        if status.online and status.node not in self._ignored:
            self._nodes = MappingProxyType({**self._nodes, status.node: status})
        elif known is not None:
            self._nodes = MappingProxyType({n: s for n, s in self._nodes.items() if n != status.node})
        if known is None or gone or known.holding != status.holding:
            self._holders = self._index()
            self.changes += 1
        return gone

    def forget(self) -> None:
        """No node is known to be online any more."""
        self._nodes = MappingProxyType({})
        self._holders = self._index()
        self.changes += 1

    def hold_locally(self, ids: frozenset[ExpertId]) -> None:
        """From now on the base station itself keeps these experts, and no others."""
        self._local = ids
        self._holders = self._index()
        self.changes += 1

    @property
    def local_experts(self) -> frozenset[ExpertId]:
        """The experts that the base station keeps itself."""
        return self._local

    @property
    def nodes(self) -> Mapping[str, NodeStatus]:
        """Status by name of the nodes online that serve this model, as of now: later changes don't show in it."""
        return self._nodes

    @property
    def ignored(self) -> Mapping[str, str]:
        """Why a node is not used although it is online, by name, as of now: it serves another model."""
        return dict(self._ignored)

    def batch_variant(self) -> list[str]:
        """The nodes that have found that what a token gets depends on its batch."""
        return sorted(n for n, s in self._nodes.items() if s.device and s.device.batch_invariant is False)

    def holders(self, id: ExpertId) -> Sequence[str]:
        """The holders of an expert: `LOCAL_NODE` first, then nodes with the fewest experts to serve, then by name.

        The order depends only on which nodes are online."""
        return tuple(self._holders.get(id, ()))

    def node_at(self, endpoint: str) -> str | None:
        """The node whose connection to the broker comes from there, as far as it says."""
        return next((n for n, s in self._nodes.items() if s.uplink and s.uplink.endpoint == endpoint), None)

    def missing(self) -> list[ExpertId]:
        """Experts of the model that nobody holds."""
        dims = self.dims
        every = (ExpertId(layer, e) for layer in range(dims.layers) for e in range(dims.experts))
        return [id for id in every if id not in self._holders]

    def describe_missing(self) -> str:
        """One line for people: what is missing, who is there, what to do."""
        missing = format_selector(self.missing())
        online = ", ".join(sorted(self._nodes)) or "none"
        ignored = "".join(f"; ignored {node}: {why}" for node, why in sorted(self._ignored.items()))
        return (
            f"no node holds {missing} (online: {online}{ignored}): "
            f"start 'wdmoe-node … --experts \"{missing}\"' on a device"
        )

    def _index(self) -> Mapping[ExpertId, list[str]]:
        holders: dict[ExpertId, list[str]] = defaultdict(list)
        for id in self._local:
            holders[id].append(LOCAL_NODE)
        load = {node: len(status.expert_ids()) for node, status in self._nodes.items()}
        for node in sorted(self._nodes, key=lambda n: (load[n], n)):
            for id in self._nodes[node].expert_ids():
                holders[id].append(node)
        return holders
