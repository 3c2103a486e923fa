"""Runs the incomplete cells of a run's folder, one after another.

A failed cell is recorded with its error and tried again on a newly started system. When its attempts are used up it
counts as failed, and the run goes on. Every wait has a deadline.
"""

import os
import time
import traceback
from dataclasses import dataclass
from typing import Any

from bs_coordinator.selection import parse_policy
from bs_coordinator.selection.registry import check_scores
from common.errors import StorageError, WdmoeError, one_line
from testbed import facts
from testbed.experiment.baselines import OnProgress
from testbed.experiment.measured_costs import measured_costs
from testbed.experiment.networks import Loopback, Network
from testbed.experiment.parallel import run_parallel
from testbed.experiment.recorder import Recorder
from testbed.experiment.system_under_test import SystemUnderTest
from testbed.experiment.systems import Systems
from testbed.experiment.watch import Watch
from testbed.experiment.workloads import run_workload, warm_up
from testbed.plan.cells import Cell
from testbed.plan.schema import Items
from testbed.run_directory.directory import NOTE, Marker, RunDir
from testbed.run_directory.file_metadata import described

_CLOCKS_S = 0.3
"""Time for comparing nodes' clocks with the base station's, before and after each cell."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run.

    Attributes:
        done: number of complete cells.
        failed: number of cells that are still incomplete.
    """

    done: int
    failed: int


def execute(
    run: RunDir,
    network: Network,
    *,
    jobs: int = 1,
    device: str | None = None,
    on_progress: OnProgress = lambda line: None,
) -> Outcome:
    """Run the incomplete cells of a run, whose lock the caller holds.

    Args:
        jobs: number of processes for cells without nodes. With several, these cells come after all those on nodes.
        device: what computes the experts in cells without nodes (`LocalExperts`).

    Raises:
        StorageError: the run's folder can't be written.
        KeyboardInterrupt: the run was interrupted; an event records it.
    """
    cells = run.cells()
    left = [(number, cell) for number, cell in enumerate(cells, 1) if not run.is_complete(cell)]
    session = _record_start(run, len(left))
    if left and facts.commit() != (run.manifest.commit, run.manifest.dirty):
        began, now = (facts.code_name(*code) for code in ((run.manifest.commit, run.manifest.dirty), facts.commit()))
        on_progress(f"the code is {now} now, but the run began with {began}: the report will point this out")
    failed = 0
    here = [cell for _, cell in left if jobs > 1 and run.plan.workload(cell.workload).where == "in-process"]
    with Watch(run, on_progress).running() as watch, Systems(run, network, watch, on_progress, device) as systems:
        try:
            if left:
                systems.baselines(session, "start")
            for number, cell in left:
                if cell in here:
                    continue
                if (number, cell) != left[0]:
                    systems.idle(run.plan.pause_s)
                on_progress(f"{number}/{len(cells)} {cell}")
                failed += not _run_with_retries(run, systems, cell, on_progress)
                watch.cell_ended()
            if here:
                systems.close()
                watch.pausing()
                failed += run_parallel(run, here, jobs, device=device, on_progress=on_progress)
            if left:
                systems.baselines(session, "end")
        except KeyboardInterrupt:
            run.event("run_interrupted")
            raise
    run.event("run_finished", failed=failed, power=facts.power())
    return Outcome(len(cells) - failed, failed)


def _record_start(run: RunDir, left: int) -> int:
    """Record the start of a session; returns its number, from 1."""
    events = run.events()
    # The boot id tells a restarted machine from a restarted runner.
    commit, dirty = facts.commit()
    about = {"boot": facts.boot_id(), "power": facts.power(), "commit": commit, "dirty": dirty}
    # Operators may add notes at any time: they don't count as work of the runner.
    own = [event for event in events if event["event"] != NOTE]
    if not own:
        run.event("run_started", left=left, **about)
        return 1
    gap_s = (time.time_ns() - own[-1]["unix_ns"]) / 1e9
    lost = run.discard_unfinished()
    after = [event["event"] for event in own if not event["event"].startswith("alert")][-1]
    run.event("run_resumed", gap_s=gap_s, after=after, left=left, lost=lost, **about)
    return 1 + sum(event["event"] in ("run_started", "run_resumed") for event in own)


def _run_with_retries(run: RunDir, systems: Systems, cell: Cell, on_progress: OnProgress) -> bool:
    for attempt in range(1, run.plan.attempts + 1):
        run.event("cell_started", cell=cell.id, attempt=attempt, what=str(cell))
        try:
            marker = _run_cell(run, systems, cell, attempt)
        except StorageError:
            raise
        # Libraries raise errors of any class (torch a RuntimeError when memory is short). If one ended the run, every
        # resumption would end at this cell.
        except Exception as error:  # noqa: BLE001
            details = {} if isinstance(error, WdmoeError) else {"traceback": traceback.format_exc()}
            kind = type(error).__name__
            run.event("cell_failed", cell=cell.id, attempt=attempt, error=one_line(error), kind=kind, **details)
            on_progress(f"   failed: {one_line(error)}")
            systems.close()
        else:
            run.event("cell_finished", cell=cell.id, attempt=attempt, seconds=marker.seconds)
            return True
    run.event("cell_given_up", cell=cell.id)
    return False


def run_alone(run: RunDir, cell: Cell, attempt: int, device: str | None) -> None:
    """Measure one cell that needs no nodes, without events of its start and end.

    Args:
        device: what computes the experts (`LocalExperts`).

    Raises:
        WdmoeError: it failed.
    """
    with Systems(run, Loopback(), Watch(run, print), print, device) as systems:
        _run_cell(run, systems, cell, attempt)


def _run_cell(run: RunDir, systems: Systems, cell: Cell, attempt: int) -> Marker:
    plan, workload = run.plan, run.plan.workload(cell.workload)
    bundle = run.manifest.bundle(cell.bundle)
    policy = parse_policy(cell.policy, top_k=bundle.top_k)
    system = systems.get(cell, workload.where)
    if not system.model.trunk.scored:
        check_scores(cell.policy, policy, top_k=bundle.top_k)
    if system.local:
        costs = measured_costs(run, cell)
        system.local.forecasts = costs.forecast if costs else None
        if costs is None:
            run.event("no_measured_costs", cell=cell.id)
    recorder = Recorder(
        top_k=bundle.top_k,
        sample_s=plan.sample_s,
        links=systems.link_values,
        telemetry=systems.telemetry,
        clocks=systems.clock_samples,
        probing=systems.probing,
        together=not isinstance(workload, Items) or workload.choosing == "together",
    )
    system.model.policy = policy
    system.model.on_step = systems.watch.step
    system.model.deadline = time.monotonic() + plan.cell_timeout_s
    started_unix_ns, began = time.time_ns(), time.monotonic()
    if system.base_station:
        system.base_station.dispatcher.measure_clocks(_CLOCKS_S)
        recorder.take_clocks("before")
        warm_up(system, plan.warm_up_tokens, recorder)
    run_workload(system, plan, cell, recorder)
    recorder.sample()
    if system.base_station:
        system.base_station.dispatcher.measure_clocks(_CLOCKS_S)
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
        load_1min=os.getloadavg()[0],
        **_placement(system),
    )
    run.commit(cell, {name: described(table, name, run.manifest) for name, table in tables.items()}, marker)
    return marker


def _placement(system: SystemUnderTest) -> dict[str, Any]:
    if system.base_station is None:
        return {}
    dispatcher = system.base_station.dispatcher
    forecasts = [dispatcher.forecast(layer) for layer in range(dispatcher.registry.dims.layers)]
    return {
        "nodes": list(dispatcher.holder_names),
        "holders": [forecast.holder.tolist() for forecast in forecasts],
        "shared_air": dispatcher.links.shared_air,
    }
