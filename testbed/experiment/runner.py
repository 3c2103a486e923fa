"""Runs the cells of a run's folder that are not complete yet, one after the other.

A cell that fails is recorded with its error, tried again on a freshly started system, and counted as failed when
its attempts are spent; the run goes on. Every wait below has a deadline.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from bs_coordinator.nodes.clock_offsets import ClockSample
from bs_coordinator.nodes.telemetry_inbox import Arrived
from bs_coordinator.selection import parse_policy
from common.errors import StorageError, WdmoeError, one_line
from testbed.experiment import facts
from testbed.experiment.baselines import Phase, measure_baselines
from testbed.experiment.costs import TRUTH, LinkRow, estimate_rows, forecast_rows, measured_costs
from testbed.experiment.networks import Network
from testbed.experiment.plan import Cell, Choice, Plan
from testbed.experiment.recorder import Recorder
from testbed.experiment.rundir import NOTE, BundleFacts, Marker, RunDir
from testbed.experiment.site import Site, distributed_site, in_process_site
from testbed.experiment.watch import Watch
from testbed.experiment.workloads import run_workload, warm_up
from wire.errors import BrokerError

Say = Callable[[str], None]

_CLOCKS_S = 0.3
"""Before and after each cell, nodes' clocks are compared with ours for this long."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        failed: cells that are still not complete.
    """

    done: int
    failed: int


def execute(run: RunDir, network: Network, *, say: Say = lambda line: None) -> Outcome:
    """Run what is left of a run; the caller holds its lock.

    Raises:
        StorageError: the run's folder can't be written any more.
        KeyboardInterrupt: after it was recorded.
    """
    cells = run.cells()
    left = [(number, cell) for number, cell in enumerate(cells, 1) if not run.is_complete(cell)]
    session = _record_start(run, len(left))
    if left and facts.commit() != (run.manifest.commit, run.manifest.dirty):
        began, now = (facts.code_name(*code) for code in ((run.manifest.commit, run.manifest.dirty), facts.commit()))
        say(f"the code is {now} now, the run was made with {began}: its report will say so")
    failed = 0
    with Watch(run, say).running() as watch, _Sites(run, network, watch, say) as sites:
        try:
            if left:
                sites.baselines(session, "start")
            for number, cell in left:
                if (number, cell) != left[0]:
                    sites.idle(run.plan.pause_s)
                say(f"{number}/{len(cells)} {cell}")
                failed += not _run_with_retries(run, sites, cell, say)
                watch.cell_ended()
            if left:
                sites.baselines(session, "end")
        except KeyboardInterrupt:
            run.event("run_interrupted")
            raise
    run.event("run_finished", failed=failed)
    return Outcome(len(cells) - failed, failed)


def _record_start(run: RunDir, left: int) -> int:
    """Which start of the runner this is, from 1."""
    events = run.events()
    # A new boot tells a machine that was restarted from a runner that was.
    commit, dirty = facts.commit()
    about = {"boot": facts.boot_id(), "power": facts.power(), "commit": commit, "dirty": dirty}
    # Operators' notes, which come at any time, are no part of the runner's work.
    own = [event for event in events if event["event"] != NOTE]
    if not own:
        run.event("run_started", left=left, **about)
        return 1
    gap_s = (time.time_ns() - own[-1]["unix_ns"]) / 1e9
    lost = run.discard_unfinished()
    after = [event["event"] for event in own if not event["event"].startswith("alert")][-1]
    run.event("run_resumed", gap_s=gap_s, after=after, left=left, lost=lost, **about)
    return 1 + sum(event["event"] in ("run_started", "run_resumed") for event in own)


def _run_with_retries(run: RunDir, sites: "_Sites", cell: Cell, say: Say) -> bool:
    for attempt in range(1, run.plan.attempts + 1):
        run.event("cell_started", cell=cell.id, attempt=attempt, what=str(cell))
        try:
            marker = _run_cell(run, sites, cell, attempt)
        except StorageError:
            raise
        # Libraries raise what they like (torch RuntimeError when memory is short, onnxruntime and pyarrow their own
        # classes). Left to end the run, it would end it at this cell whenever it is resumed.
        except Exception as error:  # noqa: BLE001
            told = {} if isinstance(error, WdmoeError) else {"traceback": traceback.format_exc()}
            kind = type(error).__name__
            run.event("cell_failed", cell=cell.id, attempt=attempt, error=one_line(error), kind=kind, **told)
            say(f"   failed: {one_line(error)}")
            sites.close()
        else:
            run.event("cell_finished", cell=cell.id, attempt=attempt, seconds=marker.seconds)
            return True
    run.event("cell_given_up", cell=cell.id)
    return False


def _run_cell(run: RunDir, sites: "_Sites", cell: Cell, attempt: int) -> Marker:
    plan, workload = run.plan, run.plan.workload(cell.workload)
    bundle = run.manifest.bundle(cell.bundle)
    policy = parse_policy(cell.policy, top_k=bundle.top_k)
    site = sites.get(cell, workload.where)
    if site.local:
        costs = measured_costs(run, cell)
        site.local.forecasts = costs.forecast if costs else None
        if costs is None:
            run.event("no_measured_costs", cell=cell.id)
    recorder = Recorder(
        top_k=bundle.top_k,
        sample_s=plan.sample_s,
        links=sites.link_rows,
        telemetry=sites.telemetry,
        clocks=sites.clock_samples,
        together=not isinstance(workload, Choice) or workload.choosing == "together",
    )
    site.model.policy = policy
    site.model.on_step = sites.watch.step
    site.model.deadline = time.monotonic() + plan.cell_timeout_s
    started_unix_ns, began = time.time_ns(), time.monotonic()
    if site.station:
        site.station.dispatcher.measure_clocks(_CLOCKS_S)
        recorder.take_clocks("before")
        warm_up(site, plan.warm_up_tokens, recorder)
    run_workload(site, workload, cell, recorder)
    recorder.sample()
    if site.station:
        site.station.dispatcher.measure_clocks(_CLOCKS_S)
        recorder.take_clocks("after")
    seconds = time.monotonic() - began
    tables = recorder.tables()
    commit, dirty = facts.commit()
    marker = Marker(
        id=cell.id,
        cell=cell,
        where=workload.where,
        attempt=attempt,
        started_unix_ns=started_unix_ns,
        seconds=seconds,
        rows={name: table.num_rows for name, table in tables.items()},
        log_ns=recorder.log_ns,
        tokens=recorder.tokens,
        write_ns=0,
        commit=commit,
        dirty=dirty,
        **_placement(site),
    )
    run.commit(cell, tables, marker)
    return marker


def _placement(site: Site) -> dict[str, Any]:
    if site.station is None:
        return {}
    dispatcher = site.station.dispatcher
    forecasts = [dispatcher.forecast(layer) for layer in range(dispatcher.fleet.dims.layers)]
    return {
        "nodes": list(dispatcher.holder_names),
        "holders": [forecast.holder.tolist() for forecast in forecasts],
        "shared_air": dispatcher.links.shared_air,
    }


class _Sites:
    """The system that is running now, if any: started when a cell needs it, ended when one needs another."""

    def __init__(self, run: RunDir, network: Network, watch: Watch, say: Say) -> None:
        self.watch = watch
        self._run, self._network, self._say = run, network, say
        self._stack = ExitStack()
        self._open: tuple[tuple[str, str], Site] | None = None
        self._started = 0

    def __enter__(self) -> "_Sites":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get(self, cell: Cell, where: str) -> Site:
        """The site for a cell; on nodes its link profile begins now, so that every arm meets the same links."""
        wanted = (cell.bundle, where)
        if self._open is None or self._open[0] != wanted:
            self.close()
            if where == "distributed":
                self._network.set_profile(cell.profile)
            self._open = wanted, self._start(cell, where)
        site = self._open[1]
        if where == "distributed":
            self._network.set_profile(cell.profile)
            asked = self._run.plan.shared_air
            site.settle(
                self._run.plan.settle_s, shared_air=self._network.shared_air(cell.profile) if asked is None else asked
            )
        return site

    def baselines(self, session: int, phase: Phase) -> None:
        """Measure what every session measures, on systems of its own."""
        self.close()
        self.watch.pausing()
        measure_baselines(
            self._run, self._network, self._nodes, self.watch.routes, session=session, phase=phase, say=self._say
        )

    def idle(self, seconds: float) -> None:
        """Let time pass between two cells. The system stays, and its connection to the broker must be kept alive."""
        self.watch.pausing()
        deadline = time.monotonic() + seconds
        while (left_s := deadline - time.monotonic()) > 0:
            station = self._open[1].station if self._open else None
            if station is None:
                time.sleep(left_s)
                continue
            try:
                station.dispatcher.measure_links(min(left_s, 1.0))
            except BrokerError:
                self.close()  # the next cell starts a new one

    def close(self) -> None:
        """End it."""
        self._open = None
        self.watch.unfollow()
        self._stack.close()

    def link_rows(self) -> list[LinkRow]:
        """Links as configured, as estimated and as forecast, for `Recorder`."""
        rows: list[LinkRow] = [(node, TRUTH, quantity, value) for node, quantity, value in self._network.truth()]
        station = self._open[1].station if self._open else None
        if station:
            dispatcher = station.dispatcher
            rows += estimate_rows(dispatcher.links.estimates(time.perf_counter()))
            rows += forecast_rows(dispatcher.holder_names, dispatcher.forecast(0))
        return rows

    def telemetry(self) -> list[Arrived]:
        """What nodes told of themselves since the last call, for `Recorder`."""
        station = self._open[1].station if self._open else None
        return station.dispatcher.telemetry.drain() if station else []

    def clock_samples(self) -> list[ClockSample]:
        """What nodes' clocks showed since the last call; they are asked again. For `Recorder`."""
        station = self._open[1].station if self._open else None
        if station is None:
            return []
        samples = station.dispatcher.clock_samples()
        station.dispatcher.ask_clocks()
        return samples

    def _start(self, cell: Cell, where: str) -> Site:
        bundle = self._run.manifest.bundle(cell.bundle)
        began = time.monotonic()
        if where == "in-process":
            site = in_process_site(self._run.plan, bundle)
        else:
            site = self._stack.enter_context(self._nodes(self._run.plan, bundle, self._network))
        ready: dict[str, object] = {"bundle": bundle.name, "where": where, "seconds": time.monotonic() - began}
        if site.station:
            nodes = site.station.dispatcher.fleet.nodes
            ready |= {
                "broker_ms": site.station.broker_ms,
                "nodes_ms": site.station.nodes_ms,
                "machines": {node: msgspec.to_builtins(status.machine) for node, status in sorted(nodes.items())},
            }
        self._run.event("site_ready", **ready)
        return site

    @contextmanager
    def _nodes(self, plan: Plan, bundle: BundleFacts, network: Network) -> Iterator[Site]:
        """A system with nodes, watched for as long as the context."""
        self._started += 1
        folder = self._run.path / "logs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{self._started}"
        broker, tell = self._run.manifest.broker, self._run.event
        with distributed_site(plan, bundle, network, folder, broker=broker, say=self._say, tell=tell) as site:
            assert site.address is not None  # noqa: S101 (it has nodes)
            self.watch.follow(site.address, site.cluster)
            try:
                yield site
            finally:
                self.watch.unfollow()
