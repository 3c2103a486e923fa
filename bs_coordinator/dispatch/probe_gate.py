"""Lets the prober send at opportunities where a probe delays no work, and at most once per interval."""

from collections.abc import Callable, Iterable, Mapping

from bs_coordinator.dispatch.layer_requests import LayerRequests
from bs_coordinator.dispatch.prober import Prober
from bs_coordinator.links import LinkMonitor
from bs_coordinator.nodes.registry import NodeRegistry
from common.clock import Clock
from wire.status import SocketFacts

_CHECK_EVERY_S = 0.01
"""How often to check which probes are due; `LinkMonitor` leaves more time than this between two probes."""


class ProbeGate:
    """Decides when the prober may send, and to which nodes: those that no open request is waiting for."""

    def __init__(
        self,
        prober: Prober,
        links: LinkMonitor,
        registry: NodeRegistry,
        *,
        broker_sockets: Callable[[], Mapping[str, SocketFacts]],
        clock: Clock,
    ) -> None:
        """Nothing is due yet.

        Args:
            broker_sockets: gives new facts about the broker's connections, by their peers' endpoints.
        """
        self._prober = prober
        self._links = links
        self._registry = registry
        self._broker_sockets = broker_sockets
        self._clock = clock
        self._next_check_s = 0.0

    def due(self, *, working: bool) -> bool:
        """Whether probes may be sent now. Cheap.

        Args:
            working: requests are under way; on shared air a probe would delay them all.
        """
        return self._clock.perf_ns() / 1e9 >= self._next_check_s and not (working and self._links.shared_air)

    def probe(self, layers: Iterable[LayerRequests]) -> None:
        """Send the probes that are due to nodes that no open request of `layers` is waiting for.

        Raises:
            BrokerError: the connection is lost.
        """
        now_s = self._clock.perf_ns() / 1e9
        self._next_check_s = now_s + _CHECK_EVERY_S
        for endpoint, facts in self._broker_sockets().items():
            if (node := self._registry.node_at(endpoint)) is not None:
                self._links.anchor(node, facts, towards_node=True, time_s=now_s)
        busy = {sub.node for layer in layers for sub in layer.open()}
        self._prober.probe([node for node in self._registry.nodes if node not in busy], now_s)
