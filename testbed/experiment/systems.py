"""The systems on which a run's cells are measured: each is kept while the following cells need the same."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec

from bs_coordinator.base_station import BaseStation
from bs_coordinator.links import Probing
from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.telemetry_inbox import ReceivedTelemetry
from testbed.experiment.baselines import OnProgress, measure_baselines
from testbed.experiment.measured_costs import estimate_values, forecast_values, probing_values
from testbed.experiment.networks import Network
from testbed.experiment.recorder import LinkValue
from testbed.experiment.system_under_test import SystemUnderTest, distributed_system, in_process_system
from testbed.experiment.watch import Watch
from testbed.plan.cells import Cell
from testbed.plan.schema import Plan
from testbed.run_directory.baselines import Phase
from testbed.run_directory.directory import BundleFacts, RunDir
from testbed.run_directory.machine_tables import TRUTH
from wire.errors import BrokerError


class Systems:
    """Starts the system that a cell needs, keeps it for the cells that follow, and ends it before starting another."""

    def __init__(
        self, run: RunDir, network: Network, watch: Watch, on_progress: OnProgress, device: str | None
    ) -> None:
        self.watch = watch
        self._device = device
        self._run, self._network, self._on_progress = run, network, on_progress
        self._stack = ExitStack()
        self._open: tuple[tuple[str, str], SystemUnderTest] | None = None
        self._started = 0

    def __enter__(self) -> "Systems":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, cell: Cell, where: str) -> SystemUnderTest:
        """The system for a cell. On nodes the link profile starts anew, so every policy sees the same links."""
        wanted = (cell.bundle, where)
        if self._open is None or self._open[0] != wanted:
            self.close()
            if where == "distributed":
                self._network.set_profile(cell.profile)
            self._open = wanted, self._start(cell, where)
        system = self._open[1]
        if where == "distributed":
            self._network.set_profile(cell.profile)
            shared_air = self._run.plan.shared_air
            if shared_air is None:
                shared_air = self._network.shared_air(cell.profile)
            system.settle(self._run.plan.settle_s, shared_air=shared_air)
        return system

    def baselines(self, session: int, phase: Phase) -> None:
        """Measure the baselines of a session on systems of their own."""
        self.close()
        self.watch.pausing()
        measure_baselines(
            self._run,
            self._network,
            self._nodes,
            self.watch.routes,
            session=session,
            phase=phase,
            on_progress=self._on_progress,
        )

    def idle(self, seconds: float) -> None:
        """Wait between two cells, keeping the system and its connection to the broker alive."""
        self.watch.pausing()
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            base_station = self._base_station()
            if base_station is None:
                time.sleep(left_s)
                continue
            try:
                base_station.dispatcher.measure_links(min(left_s, 1.0))
            except BrokerError:
                self.close()  # the next cell starts a new system

    def close(self) -> None:
        """End the running system, if any."""
        self._open = None
        self.watch.unfollow()
        self._stack.close()

    def link_values(self) -> list[LinkValue]:
        """The links now: as configured, as estimated and as forecast."""
        values = [LinkValue(node, TRUTH, quantity, value) for node, quantity, value in self._network.truth()]
        if base_station := self._base_station():
            dispatcher = base_station.dispatcher
            estimates = dispatcher.links.estimates(time.perf_counter())
            values += [*estimate_values(estimates), *probing_values(estimates)]
            values += forecast_values(dispatcher.holder_names, dispatcher.forecast(0))
        return values

    def telemetry(self) -> list[ReceivedTelemetry]:
        """Telemetry of the nodes since the last call."""
        base_station = self._base_station()
        return base_station.dispatcher.telemetry.drain() if base_station else []

    def probing(self) -> Probing:
        """What probes of all links took so far."""
        base_station = self._base_station()
        return base_station.dispatcher.links.probing() if base_station else Probing()

    def clock_samples(self) -> list[ClockSample]:
        """Answers of clock probes since the last call; sends new probes."""
        base_station = self._base_station()
        if base_station is None:
            return []
        samples = base_station.dispatcher.clock_samples()
        base_station.dispatcher.ask_clocks()
        return samples

    def _base_station(self) -> BaseStation | None:
        return self._open[1].base_station if self._open else None

    def _start(self, cell: Cell, where: str) -> SystemUnderTest:
        bundle = self._run.manifest.bundle(cell.bundle)
        began = time.monotonic()
        if where == "in-process":
            system = in_process_system(self._run.plan, bundle, self._device)
        else:
            system = self._stack.enter_context(self._nodes(self._run.plan, bundle, self._network))
        ready: dict[str, object] = {"bundle": bundle.name, "where": where, "seconds": time.monotonic() - began}
        if system.local:
            ready["experts"] = f"torch on {self._device}" if self._device else "onnxruntime"
        if system.base_station:
            nodes = system.base_station.dispatcher.registry.nodes
            ready |= {
                "levers": system.base_station.levers,
                "broker_ms": system.base_station.broker_ms,
                "nodes_ms": system.base_station.nodes_ms,
                "machines": {node: msgspec.to_builtins(status.machine) for node, status in sorted(nodes.items())},
            }
        self._run.event("site_ready", **ready)
        return system

    @contextmanager
    def _nodes(self, plan: Plan, bundle: BundleFacts, network: Network) -> Iterator[SystemUnderTest]:
        """A system with nodes that is watched for the duration of the context."""
        self._started += 1
        folder = self._run.path / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{self._started}"
        with distributed_system(
            plan,
            bundle,
            network,
            folder,
            broker=self._run.manifest.broker,
            on_progress=self._on_progress,
            emit_event=self._run.event,
        ) as system:
            assert system.address is not None  # noqa: S101 (it has nodes)
            self.watch.follow(system.address, system.cluster)
            try:
                yield system
            finally:
                self.watch.unfollow()
