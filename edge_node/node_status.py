"""What a node says about itself in its retained status: what it holds, its machine, its work so far."""

import os
import platform
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnxruntime
import psutil

from common.clock import SYSTEM_CLOCK, Clock
from edge_node.experts.runtime import ExpertRuntime
from edge_node.worker import Worker
from wire import __version__, status
from wire.experts import format_selector
from wire.status import DeviceFacts, Holding, Machine, NodeStatus, Residency, SocketFacts, Work

HEARTBEAT_S = 3.0
"""How often the retained status is renewed: it shows operators the free memory, and a second process with the same id
that this one is alive."""


class StatusSource:
    """Makes the statuses of one node.

    Attributes:
        node: id of the node.
        device: what it takes its device for.
        since_unix_ms: when it was announced; 0 before.
        rival: the process that tried to use its id last, and when; empty if there was none.
    """

    def __init__(
        self, node: str, worker: Worker, holding: Holding, *, threads: int, device: DeviceFacts | None = None,
        residency: Callable[[], Residency | None] = lambda: None, folder: Path = Path(), clock: Clock = SYSTEM_CLOCK,
    ) -> None:  # fmt: skip
        """Nothing was announced so far.

        Args:
            worker: whose work is reported.
            holding: the experts that the node serves.
            threads: computing threads.
            residency: returns which experts are in memory now; None if all are.
            folder: of the bundle, whose disk's free space is reported.
            clock: for the rate of the work.
        """
        self.node = node
        self.device = device
        self.since_unix_ms = 0
        self.rival = ""
        self._worker = worker
        self._holding = holding
        self._threads = threads
        self._residency = residency
        self._folder = folder
        self._clock = clock
        self._rows_before = (0, clock.monotonic_s())

    def online(self, uplink: SocketFacts | None, work: Work) -> NodeStatus:
        """The status of a node that takes work."""
        return self._status("online", "", uplink, work)

    def offline(self, reason: str, uplink: SocketFacts | None = None, work: Work | None = None) -> NodeStatus:
        """The status of a node that takes no work."""
        return self._status("offline", reason, uplink, work)

    def work(self) -> Work:
        """What was computed so far, and how fast since the last call."""
        rows, now_s = self._worker.rows, self._clock.monotonic_s()
        rows_before, before_s = self._rows_before
        self._rows_before = rows, now_s
        elapsed_s = now_s - before_s
        return Work(
            requests=self._worker.counts["answered"],
            rows=rows,
            rows_per_s=round((rows - rows_before) / elapsed_s, 2) if elapsed_s > 0 else 0.0,
        )

    def _status(
        self, state: Literal["online", "offline"], reason: str, uplink: SocketFacts | None, work: Work | None
    ) -> NodeStatus:  # fmt: skip
        online = state == "online"
        return NodeStatus(
            schema=status.SCHEMA,
            node=self.node,
            boot_id=self._worker.boot_id,
            state=state,
            since_unix_ms=self.since_unix_ms,
            reason=reason,
            holding=self._holding if online else None,
            machine=self._machine(),
            uplink=uplink,
            device=self.device,
            residency=self._residency() if online else None,
            work=work,
            rival=self.rival,
            frame_tags=status.FRAME_TAGS if self._worker.tagged else 0,
        )

    def _machine(self) -> Machine:
        memory = psutil.virtual_memory()
        return Machine(
            host=socket.gethostname(),
            pid=os.getpid(),
            arch=platform.machine(),
            cpus=os.cpu_count() or 1,
            threads=self._threads,
            ram_bytes=memory.total,
            available_bytes=memory.available,
            wdmoe=__version__,
            onnxruntime=onnxruntime.__version__,
            disk_free_bytes=shutil.disk_usage(self._folder).free,
        )


def residency_status(runtime: ExpertRuntime) -> Residency | None:
    """Which experts a runtime has in memory, for the status; None if it keeps all of them there."""
    if runtime.most_loaded is None:
        return None
    loads = runtime.loads
    return Residency(
        loaded=format_selector(runtime.loaded, runtime.manifest.dims.slices),
        most_loaded=runtime.most_loaded,
        loads=loads.count,
        load_ms=loads.ns / max(1, loads.count) / 1e6,
        evictions=loads.evictions,
    )
