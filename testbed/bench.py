"""Benchmarks as ratios to a floor measured in the same run: arms take turns, raw samples are kept.

- transport: one frame to an echoing MQTT client and back, against the same bytes over plain TCP.
- expert: one token through one expert, against reading its files at this machine's memory bandwidth.
"""

import json
import multiprocessing
import platform
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bs_coordinator.brokers import LOOPBACK, open_broker
from edge_node.runtime import ExpertRuntime
from testbed.demo_assets import demo_bundle
from wire import __version__
from wire.broker_url import BrokerAddress
from wire.files import atomic_write
from wire.manifest import Scheme, load_manifest, probe_input
from wire.mqtt import MqttTransport
from wire.tensors import Array

WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        floor: what `ours` is compared with.
        ours_ns, floor_ns: raw samples, taken in turns.
    """

    name: str
    floor: str
    ours_ns: list[int]
    floor_ns: list[int]

    @property
    def ratio(self) -> float:
        """Median of ours ÷ median of the floor."""
        return statistics.median(self.ours_ns) / statistics.median(self.floor_ns)


def run_bench(*, broker: str, samples: int, out: Path, console: Console) -> None:
    """Measure, print a table and write one JSON document."""
    rows = [*_transport(broker, samples), *_experts(samples, console)]
    table = Table("benchmark", "ours, median ms", "floor", "floor, median ms", "ratio")
    for row in rows:
        ours, floor = (statistics.median(s) / 1e6 for s in (row.ours_ns, row.floor_ns))
        table.add_row(row.name, f"{ours:.3f}", row.floor, f"{floor:.3f}", f"{row.ratio:.2f}")
    console.print(table)
    document = {
        "commit": _commit(),
        "wdmoe": __version__,
        "machine": {"cpu": platform.processor() or platform.machine(), "system": platform.platform()},
        "parameters": {"broker": broker, "samples": samples, "warm_up": WARM_UP},
        "rows": [{**asdict(row), "ratio": row.ratio} for row in rows],
    }
    with atomic_write(out) as file:
        file.write(json.dumps(document).encode())
    console.print(f"raw samples: {out}", style="dim")


def _in_turns(name: str, ours: Callable[[], object], floor: Callable[[], object], floor_name: str, samples: int) -> Row:
    ours_ns: list[int] = []
    floor_ns: list[int] = []
    for i in range(WARM_UP + samples):
        for call, kept in ((ours, ours_ns), (floor, floor_ns)):
            began = time.perf_counter_ns()
            call()
            if i >= WARM_UP:
                kept.append(time.perf_counter_ns() - began)
    return Row(name, floor_name, ours_ns, floor_ns)


def _transport(broker: str, samples: int) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    rows = []
    with open_broker(broker) as address, socket.create_server((LOOPBACK, 0)) as server:
        children = [
            context.Process(target=_echo_mqtt, args=(address,), daemon=True),
            context.Process(target=_echo_tcp, args=(server.getsockname()[1],), daemon=True),
        ]
        for child in children:
            child.start()
        plain, _ = server.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with plain, closing(MqttTransport(address, "bench-bs")) as transport:
            transport.subscribe("bench/back")
            while transport.receive(0.2) is None:  # until the other side has subscribed
                transport.publish("bench/there", b"?")
            while transport.receive(0.2):
                pass
            for size in (1 << 10, 8 << 10, 512 << 10):
                payload = bytes(size)

                def over_mqtt(payload: bytes = payload) -> None:
                    transport.publish("bench/there", payload)
                    transport.receive(10.0)

                def over_tcp(payload: bytes = payload) -> None:
                    plain.sendall(len(payload).to_bytes(4, "little") + payload)
                    _read_exactly(plain, len(payload))

                name = f"round trip {size >> 10} KiB, {broker}"
                rows.append(_in_turns(name, over_mqtt, over_tcp, "plain TCP", samples))
        for child in children:
            child.terminate()
            child.join(5)
    return rows


def _echo_mqtt(address: BrokerAddress) -> None:
    transport = MqttTransport(address, "bench-node")
    transport.subscribe("bench/there")
    while True:
        if message := transport.receive(1.0):
            transport.publish("bench/back", message.payload)


def _echo_tcp(port: int) -> None:
    with socket.create_connection((LOOPBACK, port)) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while size := int.from_bytes(_read_exactly(plain, 4), "little"):
            plain.sendall(_read_exactly(plain, size))


def _read_exactly(plain: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = plain.recv_into(view)
        if got == 0:
            return b""
        view = view[got:]
    return bytes(data)


def _experts(samples: int, console: Console) -> list[Row]:
    rows = []
    schemes: tuple[Scheme, ...] = ("int4", "int8", "fp32")
    for scheme in schemes:
        bundle = demo_bundle(scheme, console=console)
        manifest = load_manifest(bundle)
        # One layer after the other, as tokens come: no expert is still in the cache from its last call.
        entries = [entry for entry in manifest.experts if entry.expert == 0]
        runtime = ExpertRuntime(bundle, manifest, [entry.id for entry in entries], threads=1)
        x = probe_input(manifest.dims.hidden)
        weights = [np.ones(entry.bytes // 8, np.uint64) for entry in entries]

        def compute(runtime: ExpertRuntime = runtime, x: Array = x) -> None:
            for id in runtime.ids:
                runtime.run(id, x)

        def read(weights: list[np.ndarray[tuple[int], np.dtype[np.uint64]]] = weights) -> None:
            for array in weights:
                array.max()

        name = f"one token through {len(entries)} experts, {scheme}, one thread"
        rows.append(_in_turns(name, compute, read, "reading as many bytes", max(10, samples // 10)))
    return rows


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
