"""Accuracy of link estimates: real nodes on an emulated network, one hidden state per message, compared with iperf3.

All messages have the same size, which is the hardest case: only probes separate the round trip from the rates.
"""

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from bs_coordinator.broker.processes import open_broker
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.dispatch.readiness import wait_for_experts
from bs_coordinator.engine.step_records import DispatchRecord
from bs_coordinator.nodes.registry import NodeRegistry
from common.files import atomic_write
from testbed.local_nodes import local_nodes
from testbed.network import namespaces
from testbed.network.check import check_node
from testbed.network.daemon import BASE_STATION
from testbed.network.emulated import EmulatedNetwork, emulated
from wire import frames
from wire.manifest import load_manifest
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transports import connect

_TRUNK_S = 0.003
"""Pause between messages, as long as the base station's own work."""
_WARM_UP = 64
"""Messages per node before its predictions and rates count."""
_NEIGHBOURS = 8
_FOLLOWED = 0.15
Float = NDArray[np.float64]


class ProfileAccuracy(Struct, frozen=True, kw_only=True):
    """Accuracy for one link profile.

    Attributes:
        profile: name of the profile.
        messages: number of messages that count.
        error: median |predicted − typical| / typical network time; typical is the median of a message and its
            neighbours on the same link, so a message's own jitter is not an error of the prediction.
        single_error: median |predicted − measured| / measured, jitter included.
        spread: median |measured − typical| / typical: what no prediction can know.
        down_error, up_error: median over nodes and time of |estimated − configured| / configured goodput.
        iperf_node: the node whose link was also measured with iperf3, at the end: the profile was held and each link
            had carried 64 more messages, enough to follow a step.
        down_mbps, up_mbps: estimates at that time.
        iperf_down_mbps, iperf_up_mbps: measured with iperf3 at that time.
        step_messages: after a step of the links, messages on each link until the estimated goodput of both directions
            was within 15 % of the new one; −1 for never. Empty without a step.
        probe_bytes: frames of probes per message meanwhile, to the nodes and from them.
        message_bytes: frames of a message, to the node and from it.
    """

    profile: str
    messages: int
    error: float
    single_error: float
    spread: float
    down_error: float
    up_error: float
    iperf_node: str
    down_mbps: float
    up_mbps: float
    iperf_down_mbps: float
    iperf_up_mbps: float
    step_messages: list[int]
    probe_bytes: tuple[float, float]
    message_bytes: tuple[int, int]

    @property
    def iperf_errors(self) -> tuple[float, float]:
        """|estimated − iperf3| / iperf3, for down and up."""
        return abs(self.down_mbps / self.iperf_down_mbps - 1), abs(self.up_mbps / self.iperf_up_mbps - 1)

    @property
    def probe_share(self) -> float:
        """The share of all frames' bytes that were probes."""
        return sum(self.probe_bytes) / (sum(self.probe_bytes) + sum(self.message_bytes))


class _Trace:
    """One link's messages: predicted and measured network time, estimated and true goodput."""

    def __init__(self) -> None:
        self.predicted_s: list[float] = []
        self.measured_s: list[float] = []
        self.estimated: list[tuple[float, float]] = []
        self.true: list[tuple[float, float]] = []

    def typical_s(self) -> Float:
        measured = np.array(self.measured_s)
        return np.array(
            [np.median(measured[max(0, i - _NEIGHBOURS) : i + _NEIGHBOURS + 1]) for i in range(len(measured))]
        )

    def step_messages(self) -> int | None:
        """Messages after the first step until the estimates have followed (`ProfileAccuracy.step_messages`)."""
        true = np.array(self.true)
        jumps = np.flatnonzero(np.abs(np.diff(true[:, 0])) > 0.3 * true[:-1, 0])
        if not len(jumps):
            return None
        start = int(jumps[0]) + 1
        errors = np.abs(np.array(self.estimated)[start:] / true[start:] - 1).max(axis=1)
        within = np.flatnonzero(errors <= _FOLLOWED)
        return int(within[0]) if len(within) else -1


def measure_accuracy(
    spec: Path, bundle: Path, profiles: Sequence[str], *, seconds: float, out: Path, console: Console
) -> list[ProfileAccuracy]:
    """Run the profiles, and print and write a table.

    Args:
        spec: description of the emulated network.
        bundle: bundle of the nodes.
        profiles: profiles to run; all if empty.
        seconds: duration of messages per profile.
        out: JSON file of the results.
        console: where to print.

    Raises:
        PrivilegeError, NetworkSpecError, NetworkError: the network can't be brought up.
        BrokerError, PlacementError, DispatchError: the system does not come up.
    """
    manifest = load_manifest(bundle)
    with (
        emulated(spec) as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
        open_broker("mosquitto", host=network.bs_address) as address,
        local_nodes(
            bundle,
            address,
            out.parent / "link-accuracy-logs",
            {node: f"L*:E{k}" for k, node in enumerate(network.nodes)},
            prefixes={node: network.prefix(node) for node in network.nodes},
        ),
        closing(connect(address, "wdmoe-bs-accuracy")) as transport,
    ):
        registry = NodeRegistry(manifest.dims, manifest.model_sha256)
        dispatcher = Dispatcher(transport, Topics("default"), registry, dtype=WireDtype.FP16, timeout_s=30.0)
        wait_for_experts(dispatcher, timeout_s=60.0)
        results = []
        for profile in profiles or tuple(network.spec.profiles):
            with console.status(profile):
                results.append(_measure_profile(network, dispatcher, profile, seconds))
            _print(results[-1:], console)
    with atomic_write(out) as file:
        file.write(msgspec.json.format(msgspec.json.encode(results)))
    _print(results, console)
    return results


def _measure_profile(network: EmulatedNetwork, dispatcher: Dispatcher, profile: str, seconds: float) -> ProfileAccuracy:
    rng = np.random.default_rng(0)
    dispatcher.links.shared_air = network.spec.profiles[profile].shared_air
    dispatcher.links.forget()
    network.set_profile(profile)
    dispatcher.measure_links(1.0)
    traces: dict[str, _Trace] = defaultdict(_Trace)
    probed, began = dispatcher.links.probing(), time.monotonic()
    while time.monotonic() - began < seconds:
        at_s = time.monotonic() - began + 1.0
        predicted, records = _exchange(network, dispatcher, rng)
        estimates = {e.node: e.link for e in dispatcher.links.estimates(time.perf_counter())}
        for record in records:
            trace, estimate = traces[record.node], estimates[record.node]
            truth = network.spec.profiles[profile].link(record.node, at_s)
            trace.predicted_s.append(predicted[record.node])
            trace.measured_s.append(record.network_ns / 1e9)
            trace.estimated.append((estimate.down_mbps, estimate.up_mbps))
            trace.true.append((truth.down_mbps, truth.up_mbps))
    messages, now_probed = sum(len(trace.measured_s) for trace in traces.values()), dispatcher.links.probing()
    probe_bytes = (
        (now_probed.down_bytes - probed.down_bytes) / messages, (now_probed.up_bytes - probed.up_bytes) / messages,
    )  # fmt: skip
    network.hold(network.status().at_s)
    carried: Counter[str] = Counter()
    while any(carried[node] < _WARM_UP for node in network.nodes):
        carried.update(record.node for record in _exchange(network, dispatcher, rng)[1])
    return _summary(network, dispatcher, profile, traces, probe_bytes)


def _exchange(
    network: EmulatedNetwork, dispatcher: Dispatcher, rng: np.random.Generator
) -> tuple[dict[str, float], Sequence[DispatchRecord]]:
    """Send one hidden state to two nodes; return the predicted network times in seconds, and the records."""
    dims, nodes = dispatcher.registry.dims, network.nodes
    down_bytes, up_bytes = _message_bytes(dispatcher)
    chosen = rng.choice(len(nodes), 2, replace=False)
    gate = np.zeros((1, dims.experts), np.float32)
    gate[0, chosen] = 0.5
    link_s = dispatcher.links.link_s
    predicted = {nodes[k]: link_s(nodes[k], down_bytes=down_bytes, up_bytes=up_bytes) for k in chosen}
    hidden = rng.standard_normal((1, dims.hidden)).astype(np.float32)
    records = dispatcher.apply(int(rng.integers(dims.layers)), hidden, gate).dispatches
    dispatcher.pump(_TRUNK_S)
    return predicted, records


def _message_bytes(dispatcher: Dispatcher) -> tuple[int, int]:
    row_bytes = WireDtype.FP16.codec.row_bytes(dispatcher.registry.dims.hidden)
    return frames.HEADER_BYTES + 2 * frames.ROW_BYTES + row_bytes, frames.RESULT_BYTES + row_bytes


def _summary(
    network: EmulatedNetwork,
    dispatcher: Dispatcher,
    profile: str,
    traces: dict[str, _Trace],
    probe_bytes: tuple[float, float],
) -> ProfileAccuracy:
    node = network.nodes[0]
    estimate = next(e.link for e in dispatcher.links.estimates(time.perf_counter()) if e.node == node)
    iperf = check_node(network, profile, node)
    counted = list(traces.values())
    predicted, measured, typical = (
        np.concatenate([part[_WARM_UP:] for part in parts])
        for parts in (
            [t.predicted_s for t in counted], [t.measured_s for t in counted], [t.typical_s() for t in counted],
        )
    )  # fmt: skip
    estimated = np.concatenate([np.array(t.estimated)[_WARM_UP:] for t in counted])
    true = np.concatenate([np.array(t.true)[_WARM_UP:] for t in counted])
    rates_off = np.median(np.abs(estimated / true - 1), axis=0)
    steps = [s for t in traces.values() if (s := t.step_messages()) is not None]
    return ProfileAccuracy(
        profile=profile,
        messages=len(predicted),
        error=float(np.median(np.abs(predicted / typical - 1))),
        single_error=float(np.median(np.abs(predicted / measured - 1))),
        spread=float(np.median(np.abs(measured / typical - 1))),
        down_error=float(rates_off[0]),
        up_error=float(rates_off[1]),
        iperf_node=node,
        down_mbps=estimate.down_mbps,
        up_mbps=estimate.up_mbps,
        iperf_down_mbps=iperf.down.measured_mbps,
        iperf_up_mbps=iperf.up.measured_mbps,
        step_messages=steps,
        probe_bytes=probe_bytes,
        message_bytes=_message_bytes(dispatcher),
    )


def _print(results: Sequence[ProfileAccuracy], console: Console) -> None:
    table = Table(title="errors of estimates, medians in %")
    for column in (
        "profile", "mes-\nsages", "round\ntrip", "each\none", "their\nspread", "down", "up", "iperf3\ndown",
        "iperf3\nup", "step,\nmessages", "probes,\n% of bytes",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "profile" else "right")
    for r in results:
        shares = (r.error, r.single_error, r.spread, r.down_error, r.up_error, *r.iperf_errors)
        followed = [count if count >= 0 else math.inf for count in r.step_messages]
        step = f"{statistics.median(followed):.0f}" if followed else "–"
        table.add_row(
            r.profile, str(r.messages), *(f"{100 * share:.1f}" for share in shares), step, f"{100 * r.probe_share:.0f}"
        )
    console.print(table)
