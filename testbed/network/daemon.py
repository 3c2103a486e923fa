"""The process behind an emulated network: `python -m testbed.network.daemon NAME READY_FD [OWNER]`. Started by `up`.

It makes the namespaces and TAPs, writes to READY_FD that it is ready or what went wrong, and relays until SIGTERM or
until the process OWNER has ended. Its TAPs vanish with it, however it ends; `down` removes everything else.
"""

import ctypes
import gc
import hashlib
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import msgspec

from common import real_time
from common.cores import usable_cores
from common.errors import WdmoeError
from common.files import append_all
from testbed.network import namespaces
from testbed.network.control import ControlServer, Counters, Hold, NetworkStatus, NodeLinkStatus, Request, SetProfile
from testbed.network.model import MTU_BYTES, AirModel
from testbed.network.relay import Relay, mac
from testbed.network.spec import NetworkSpec, read_spec
from testbed.network.state import State, locked
from testbed.network.timeline import Timeline

BASE_STATION = "bs"
READY = "ready"

_TICK_S = 0.05
"""Interval of timeline updates, which is the step size of ramps."""
_HEALTH_S = 1.0
_PR_SET_TIMERSLACK = 29


class Daemon:
    """A running network, single-threaded.

    Args:
        state: the network's files, with the description already there.
        owner: id of the process whose end also ends the network; None for a network that stays.

    Attributes:
        own_core: whether the relay may busy-wait while frames arrive.
    """

    def __init__(self, state: State, owner: int | None) -> None:
        self._owner = [os.pidfd_open(owner)] if owner is not None else []
        self._spec = spec = read_spec(state.spec)
        self._spec_sha256 = hashlib.sha256(state.spec.read_bytes()).hexdigest()
        self._model = AirModel(len(spec.node_ids), queue_s=spec.queue_ms / 1e3, seed=spec.seed)
        # A core for each node, the base station, the broker, and the relay.
        self.own_core = usable_cores() >= len(spec.node_ids) + 3
        self._relay = Relay(_open_taps(spec), self._model, own_core=self.own_core)
        self._control = ControlServer(state.control, self._answer)
        self._truth = os.open(state.truth, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        now = time.monotonic()
        self._timeline = Timeline(spec, now)
        self._late_s = self._cpu_share = 0.0
        self._health_at, self._health_cpu_s = now, time.process_time()
        self._configure(now)

    def run(self) -> None:
        """Relay frames until a signal arrives or the owner has ended."""
        tick = time.monotonic()
        while True:
            for fileno in self._relay.wait(tick, [*self._control.filenos(), *self._owner]):
                if fileno in self._owner:
                    return
                self._control.handle(fileno)
            now = time.monotonic()
            if now >= tick:
                tick = now + _TICK_S
                if self._timeline.advance(now):
                    self._configure(now)
                self._control.drop_late()
                self._note_health(now)

    def _configure(self, now: float) -> None:
        links = self._timeline.links
        self._model.configure(
            now, [links[node] for node in self._spec.node_ids], shared_air=self._timeline.profile.shared_air
        )
        wall = time.time()
        lines = [
            msgspec.json.encode(
                {"time": wall, "node": node, "profile": self._timeline.profile_name, **msgspec.structs.asdict(link)}
            )
            for node, link in self._timeline.to_record(now).items()
        ]
        if lines:
            append_all(self._truth, b"\n".join(lines) + b"\n")

    def _note_health(self, now: float) -> None:
        passed_s = now - self._health_at
        if passed_s >= _HEALTH_S:
            cpu_s = time.process_time()
            self._cpu_share = (cpu_s - self._health_cpu_s) / passed_s
            self._late_s = self._relay.take_worst_late_s()
            self._health_at, self._health_cpu_s = now, cpu_s

    def _answer(self, request: Request) -> NetworkStatus:
        now = time.monotonic()
        if isinstance(request, SetProfile):
            self._timeline.set_profile(request.profile, now)
            self._configure(now)
        elif isinstance(request, Hold):
            self._timeline.hold(request.at_s, now)
            self._configure(now)
        down, up = (
            [Counters(**one) for one in of_nodes]  # type: ignore[arg-type]
            for of_nodes in self._model.counters().values()
        )
        return NetworkStatus(
            name=self._spec.name,
            pid=os.getpid(),
            spec_sha256=self._spec_sha256,
            profile=self._timeline.profile_name,
            shared_air=self._timeline.profile.shared_air,
            at_s=self._timeline.at_s(now),
            held=self._timeline.held_s is not None,
            late_ms=self._late_s * 1e3,
            cpu_percent=self._cpu_share * 100,
            nodes=[
                NodeLinkStatus(node, self._spec.address(k + 1), self._timeline.links[node], down[k], up[k])
                for k, node in enumerate(self._spec.node_ids)
            ],
        )


def _open_taps(spec: NetworkSpec) -> list[int]:
    taps = []
    for index, host in enumerate((BASE_STATION, *spec.node_ids)):
        name = namespaces.namespace(spec.name, host)
        namespaces.create(name)
        taps.append(
            namespaces.open_tap(name, spec.address(index), spec.network.prefixlen, mac(index), mtu_bytes=MTU_BYTES)
        )
    return taps


def _raise_priority(*, own_core: bool) -> None:
    """Take precedence over the processes being measured, even if those run with real-time priority (`chrt`).

    Without the permission to do so, the relay keeps its priority.
    """
    own = os.sched_getparam(0).sched_priority
    with suppress(PermissionError):
        if own_core:
            # The kernel pauses real-time processes that never sleep for 50 ms of each second.
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        else:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(max(own, real_time.LEVEL) + 1))
    # Without real-time priority, the kernel delays timers by up to 50 µs to save power: reduce that to 1 ns.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    # Nothing below makes reference cycles; a collection would only delay frames.
    gc.collect()
    gc.freeze()
    gc.disable()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _remove(name: str) -> None:
    """Remove the network of an owner that has ended: its name may never come again, and nobody would clean up."""
    with locked(name) as files:
        for namespace in namespaces.existing().get(name, []):
            namespaces.remove(namespace)
        files.remove()


def main() -> None:
    """Entry point of the relay process."""
    name, ready_fd, *owner = sys.argv[1:]
    state = State(name)
    state.write_pid()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(Path("/"))
    with os.fdopen(int(ready_fd), "w") as ready:
        try:
            daemon = Daemon(state, int(owner[0]) if owner else None)
        except (WdmoeError, ProcessLookupError) as error:
            ready.write(str(error))
            raise SystemExit(1) from None
        _raise_priority(own_core=daemon.own_core)
        ready.write(READY)
    daemon.run()
    _remove(name)


if __name__ == "__main__":
    main()
