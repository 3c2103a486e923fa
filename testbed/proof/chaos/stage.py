"""What faults happen to: a broker that can be restarted, node processes, links, and an uninvited guest."""

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
from wire.broker_url import BrokerAddress
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
    """An emulated network with a profile for every link fault."""
    calm = {"down_mbps": 50, "up_mbps": 50, "delay_ms": 1}
    profiles: dict[str, object] = {CALM: {"default": calm}}
    for percent in LOSSES_PERCENT:
        profiles[f"loss-{percent}"] = {"default": {**calm, "loss_percent": percent}}
    for node in nodes:
        profiles[f"blackhole-{node}"] = {"default": calm, "nodes": {node: {"loss_percent": 100}}}
        profiles[f"slow-{node}"] = {"default": calm, "nodes": {node: {"down_mbps": 2, "up_mbps": 2, "delay_ms": 40}}}
    return {"name": "chaos", "nodes": list(nodes), "subnet": "10.78.0.0/24", "profiles": profiles}


class Links:
    """The network between the processes; without emulation its profiles can't change."""

    address = "127.0.0.1"

    def prefix(self, node: str) -> list[str]:
        """What to put before a node's command."""
        return []

    def set_profile(self, name: str) -> None:
        """Change the links."""
        if name != CALM:
            raise ValueError(f"loopback has no profile '{name}'")


class EmulatedLinks(Links):
    """An emulated network that is up."""

    def __init__(self, network: "EmulatedNetwork") -> None:
        self.address = network.bs_address
        self._network = network

    def prefix(self, node: str) -> list[str]:
        """See `Links.prefix`."""
        return self._network.prefix(node)

    def set_profile(self, name: str) -> None:
        """See `Links.set_profile`."""
        self._network.set_profile(name)


class Stage:
    """Broker and nodes, each expert on two of them."""

    def __init__(self, bundle: Path, folder: Path, nodes: Sequence[str], experts: int, links: Links) -> None:
        """Nothing runs yet.

        Args:
            experts: per layer; node k of n holds experts k, k + 1, k + n, k + 1 + n, ….
        """
        self.nodes = tuple(nodes)
        self._links = links
        self._broker = ExitStack()
        # Threads that stay: the kernel ends a child with the thread that started it (`die_with_parent`).
        self._threads = ThreadPoolExecutor(4)
        self.address = BrokerAddress(links.address, free_port(links.address))
        self.fleet = LocalNodes(bundle, self.address, folder / "nodes", cluster="chaos")
        n = len(nodes)
        self._experts = {
            node: "L*:E" + ",".join(str(e) for e in range(experts) if e % n in (k, (k + 1) % n))
            for k, node in enumerate(nodes)
        }

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything, for as long as the context."""
        try:
            self.start_broker()
            for node in self.nodes:
                self.start_node(node)
            yield
        finally:
            self._threads.shutdown(cancel_futures=True)
            self.fleet.stop()
            self._broker.close()

    def start_broker(self) -> None:
        """On the same port as before."""
        self._broker.enter_context(open_broker("mosquitto", host=self.address.host, port=self.address.port))

    def start_node(self, node: str, *, extra_prefix: Sequence[str] = ()) -> None:
        """Start or replace a node's process."""
        prefix = [*self._links.prefix(node), *extra_prefix]
        self.fleet.start(node, self._experts[node], prefix=prefix)

    def revive(self) -> list[str]:
        """Start again what is not running; the nodes that had ended."""
        ended = [node for node, process in self.fleet.processes.items() if process.poll() is not None]
        for node in ended:
            self.start_node(node)
        return ended

    def begin(self, fault: Fault, rng: random.Random) -> "Future[None]":
        """Let a fault happen beside the answer."""
        return self._threads.submit(self.happen, fault, rng)

    def happen(self, fault: Fault, rng: random.Random) -> None:
        """Let a fault begin, last and end; returns when all is as before.

        Raises:
            WdmoeError: the stage itself broke down.
        """
        process = self.fleet.processes.get(fault.node)
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
                guest = {"noise": self._noise, "flood": self._flood, "strangers": self._strangers}[fault.kind]
                with suppress(BrokerError):  # the broker may be down for another fault's sake
                    guest(time.monotonic() + fault.for_s, rng)
            case _:  # hits the base station itself, see `answers`
                return

    def _with_profile(self, name: str, seconds: float) -> None:
        self._links.set_profile(name)
        time.sleep(seconds)
        self._links.set_profile(CALM)

    def _noise(self, until: float, rng: random.Random) -> None:
        """Repeats what it overhears, unchanged or with a bit flipped."""
        topics = Topics("chaos")
        with closing(connect(self.address, f"noise-{rng.random()}")) as guest:
            guest.subscribe(topics.work("+"))
            guest.subscribe(topics.results("+"))
            ours: set[int] = set()
            while time.monotonic() < until:
                message = guest.receive(0.05)
                if message is None or hash(message.payload) in ours:
                    continue
                changed = bytearray(message.payload)
                if rng.random() < 0.5 and changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                ours.add(hash(bytes(changed)))
                guest.publish(message.topic, bytes(changed))

    def _flood(self, until: float, rng: random.Random) -> None:
        """As much nonsense as the base station and a node can be sent by a member of the cluster."""
        topics = Topics("chaos")
        with closing(connect(self.address, f"flood-{rng.random()}")) as guest:
            while time.monotonic() < until:
                node = rng.choice(self.nodes)
                for topic in (topics.results(node), topics.work(node), topics.status(f"ghost{rng.randrange(50)}")):
                    guest.publish(topic, rng.randbytes(_FLOOD_BYTES))
                guest.receive(_FLOOD_PAUSE_S)

    def _strangers(self, until: float, rng: random.Random) -> None:
        """Connections that speak no MQTT, or begin and say nothing."""
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
    """The description as a file, for `read_spec`."""
    path.write_bytes(msgspec.yaml.encode(network_description(nodes)))
