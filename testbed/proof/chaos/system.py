"""The system under test: a broker that can be restarted, node processes and links, with the faults to inject."""

import random
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bs_coordinator.broker.processes import free_port, open_broker
from testbed.local_nodes import LocalNodes
from testbed.proof.chaos.schedule import LOSSES_PERCENT, Fault
from wire.broker_address import BrokerAddress
from wire.errors import BrokerError
from wire.topics import Topics
from wire.transports import connect

if TYPE_CHECKING:
    from testbed.network.emulated import EmulatedNetwork

CALM = "calm"
_PREFIXES = {"clock": ["unshare", "--time", "--monotonic", "1000000", "--boottime", "1000000", "--"]}
_FLOOD_BYTES = 2000
_FLOOD_PAUSE_S = 0.002


def network_description(nodes: Sequence[str]) -> dict[str, object]:
    """Description of an emulated network with a profile for every link fault."""
    calm = {"down_mbps": 50, "up_mbps": 50, "delay_ms": 1}
    profiles: dict[str, object] = {CALM: {"default": calm}}
    for percent in LOSSES_PERCENT:
        profiles[f"loss-{percent}"] = {"default": {**calm, "loss_percent": percent}}
    for node in nodes:
        profiles[f"blackhole-{node}"] = {"default": calm, "nodes": {node: {"loss_percent": 100}}}
        profiles[f"slow-{node}"] = {"default": calm, "nodes": {node: {"down_mbps": 2, "up_mbps": 2, "delay_ms": 40}}}
    return {"name": "chaos", "nodes": list(nodes), "subnet": "10.78.0.0/24", "profiles": profiles}


class Links:
    """The network between the processes: here loopback, without emulation, which has only the profile `CALM`."""

    address = "127.0.0.1"

    def prefix(self, node: str) -> list[str]:
        """Words to put before a node's command."""
        return []

    def set_profile(self, name: str) -> None:
        """Switch to a profile.

        Raises:
            ValueError: there is no profile of that name.
        """
        if name != CALM:
            raise ValueError(f"loopback has no profile '{name}'")


class EmulatedLinks(Links):
    """Links of an emulated network that is up."""

    def __init__(self, network: "EmulatedNetwork") -> None:
        self.address = network.bs_address
        self._network = network

    def prefix(self, node: str) -> list[str]:
        """Words that run a node's command in its network namespace."""
        return self._network.prefix(node)

    def set_profile(self, name: str) -> None:
        """Switch the emulated network to a profile.

        Raises:
            NetworkError: there is no profile of that name.
        """
        self._network.set_profile(name)


class TestSystem:
    """Broker and nodes, with each expert on two nodes.

    Attributes:
        node_ids: ids of all nodes.
        nodes: their processes.
        address: of the broker.
    """

    __test__ = False  # not a pytest class

    def __init__(self, bundle: Path, folder: Path, nodes: Sequence[str], experts: int, links: Links) -> None:
        """Prepare the system; nothing runs yet.

        Args:
            bundle: bundle of the nodes.
            folder: folder for logs.
            nodes: node ids.
            experts: experts per layer; node k of n holds experts k, k + 1, k + n, k + 1 + n, ….
            links: network between the processes.
        """
        self.node_ids = tuple(nodes)
        self._links = links
        self._broker = ExitStack()
        # These threads outlive the nodes: a child dies with the thread that started it (`die_with_parent`).
        self._threads = ThreadPoolExecutor(4)
        self.address = BrokerAddress(links.address, free_port(links.address))
        self.nodes = LocalNodes(bundle, self.address, folder / "nodes", cluster="chaos")
        n = len(nodes)
        self._experts = {
            node: "L*:E" + ",".join(str(e) for e in range(experts) if e % n in (k, (k + 1) % n))
            for k, node in enumerate(nodes)
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run broker and nodes for the duration of the context."""
        try:
            self.start_broker()
            for node in self.node_ids:
                self.start_node(node)
            yield
        finally:
            self._threads.shutdown(cancel_futures=True)
            self.nodes.stop()
            self._broker.close()

    def start_broker(self) -> None:
        """Start the broker, always on the same port."""
        self._broker.enter_context(open_broker("mosquitto", host=self.address.host, port=self.address.port))

    def start_node(self, node: str, *, extra_prefix: Sequence[str] = ()) -> None:
        """Start a node's process, or start it again."""
        prefix = [*self._links.prefix(node), *extra_prefix]
        self.nodes.start(node, self._experts[node], prefix=prefix)

    def revive(self) -> list[str]:
        """Restart nodes that have ended, and return their ids."""
        ended = [node for node, process in self.nodes.processes.items() if process.poll() is not None]
        for node in ended:
            self.start_node(node)
        return ended

    def begin(self, fault: Fault, rng: random.Random) -> "Future[None]":
        """Inject a fault from another thread."""
        return self._threads.submit(self.inject, fault, rng)

    def inject(self, fault: Fault, rng: random.Random) -> None:
        """Inject a fault, wait for its duration, and end it.

        Raises:
            WdmoeError: the fault could not be injected or ended.
        """
        process = self.nodes.processes.get(fault.node)
        match fault.kind:
            case "kill" | "clock":
                assert process is not None  # noqa: S101 - these kinds name a node
                process.kill()
                process.wait()
                time.sleep(fault.for_s)
                self.start_node(fault.node, extra_prefix=_PREFIXES.get(fault.kind, ()))
            case "stop":
                assert process is not None  # noqa: S101 - this kind names a node
                process.send_signal(signal.SIGSTOP)
                time.sleep(fault.for_s)
                process.send_signal(signal.SIGCONT)
            case "broker":
                self._broker.close()
                time.sleep(fault.for_s)
                self.start_broker()
            case "blackhole" | "slow":
                self._with_profile(f"{fault.kind}-{fault.node}", fault.for_s)
            case "loss":
                self._with_profile(f"loss-{fault.level}", fault.for_s)
            case "noise" | "flood" | "strangers":
                attack = {"noise": self._noise, "flood": self._flood, "strangers": self._strangers}[fault.kind]
                with suppress(BrokerError):  # another fault may have stopped the broker
                    attack(time.monotonic() + fault.for_s, rng)
            case _:  # concerns the base station, which `make_answer` handles
                return

    def _with_profile(self, name: str, seconds: float) -> None:
        self._links.set_profile(name)
        time.sleep(seconds)
        self._links.set_profile(CALM)

    def _noise(self, until: float, rng: random.Random) -> None:
        """Replay received work and results, unchanged or with one bit flipped."""
        topics = Topics("chaos")
        with closing(connect(self.address, f"noise-{rng.random()}")) as client:
            client.subscribe(topics.work("+"))
            client.subscribe(topics.results("+"))
            ours: set[int] = set()
            while time.monotonic() < until:
                message = client.receive(0.05)
                if message is None or hash(message.payload) in ours:
                    continue
                changed = bytearray(message.payload)
                if rng.random() < 0.5 and changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                ours.add(hash(bytes(changed)))
                client.publish(message.topic, bytes(changed))

    def _flood(self, until: float, rng: random.Random) -> None:
        """Send random payloads to the base station and to nodes, as a member of the cluster could."""
        topics = Topics("chaos")
        with closing(connect(self.address, f"flood-{rng.random()}")) as client:
            while time.monotonic() < until:
                node = rng.choice(self.node_ids)
                for topic in (topics.results(node), topics.work(node), topics.status(f"ghost{rng.randrange(50)}")):
                    client.publish(topic, rng.randbytes(_FLOOD_BYTES))
                client.receive(_FLOOD_PAUSE_S)

    def _strangers(self, until: float, rng: random.Random) -> None:
        """Open connections that send random bytes and then stay idle."""
        idle = []
        while time.monotonic() < until:
            with suppress(OSError):
                stranger = socket.create_connection((self.address.host, self.address.port), timeout=1.0)
                stranger.sendall(rng.randbytes(200))
                idle.append(stranger)
            time.sleep(0.05)
        for stranger in idle:
            stranger.close()


def write_network(nodes: Sequence[str], path: Path) -> None:
    """Write the description of the network to a file."""
    path.write_bytes(msgspec.yaml.encode(network_description(nodes)))
