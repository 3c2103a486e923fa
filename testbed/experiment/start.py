"""Creates a run's folder from a plan, and runs the cells of a folder."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.console import Console

from common.interruption import interrupt
from testbed import facts
from testbed.demo_assets import demo_bundle
from testbed.errors import FailedCellsError, RunDirectoryError
from testbed.experiment.baselines import OnProgress
from testbed.experiment.networks import open_network
from testbed.experiment.plan_files import check_bundle, check_data_sets, check_files, data_sets, named_demo_bundle
from testbed.experiment.runner import Outcome, execute
from testbed.experiment.system_under_test import broker_of
from testbed.network.namespaces import check_privileges
from testbed.plan.cells import expand
from testbed.plan.schema import Plan
from testbed.run_directory.directory import SCHEMA, BundleFacts, RunDir, RunManifest
from wire.manifest import MANIFEST_NAME, load_manifest, sha256_file

_STOPPING = b"stopping: the cell in progress is abandoned; 'resume' measures it again\n"


def create_run(plan: Plan, out: Path, *, console: Console) -> RunDir:
    """Prepare the bundles of a plan and make the run's folder.

    Raises:
        PlanError: a bundle or data set of the plan is missing.
        RunDirectoryError: `out` is not empty.
        PrivilegeError: this process lacks the rights to bring up the plan's network.
    """
    if plan.emulated:
        check_privileges()
    check_files(plan)
    check_data_sets(plan)
    bundles = [bundle_facts(name, console=console) for name in plan.bundles]
    for bundle in bundles:
        check_bundle(plan, bundle.name, top_k=bundle.top_k, experts=bundle.experts)
    commit, dirty = facts.commit()
    manifest = RunManifest(
        schema=SCHEMA,
        name=plan.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        commit=commit,
        dirty=dirty,
        argv=facts.argv(),
        plan=plan,
        cells=len(expand(plan)),
        broker=broker_of(plan),
        bundles=bundles,
        datasets={path: sha256_file(Path(path)) for path in data_sets(plan)},
        network=Path(plan.emulated).read_text(encoding="utf-8") if plan.emulated else "",
        versions=facts.versions(),
        machine=facts.machine(),
        power=facts.power(),
        wifi=facts.wifi(),
    )
    return RunDir.create(out, manifest)


def bundle_facts(name: str, *, console: Console) -> BundleFacts:
    """Identity and size of a bundle of a plan; bundles of the demo model are exported if they don't exist yet.

    Raises:
        PlanError: there is no such bundle.
        BundleError: the bundle's folder is damaged.
    """
    path = bundle_path(name, console=console)
    manifest = load_manifest(path)
    return BundleFacts(
        name=name,
        path=str(path),
        model_sha256=manifest.model_sha256,
        manifest_sha256=sha256_file(path / MANIFEST_NAME),
        quantisation=str(manifest.quantisation),
        layers=manifest.dims.layers,
        experts=manifest.dims.experts,
        top_k=manifest.dims.top_k,
    )


def bundle_path(name: str, *, console: Console) -> Path:
    """The folder of a bundle of a plan; bundles of the demo model are exported if they don't exist yet."""
    if "/" in name:
        return Path(name)
    demo = named_demo_bundle(name)
    return demo_bundle(demo.scheme, model=demo.model, block=demo.block, console=console)


def run_cells(run: RunDir, *, jobs: int = 1, device: str | None = None, on_progress: OnProgress) -> Outcome:
    """Run the incomplete cells of a run; a complete run is left untouched.

    Args:
        jobs: number of processes for cells without nodes.
        device: what computes the experts in these cells (`testbed.evaluation.local_experts.LocalExperts`).

    Raises:
        RunDirectoryError: another process runs it, or its bundles, data or network have changed.
        NetworkError, PrivilegeError: the plan's network doesn't come up.
    """
    with run.lock():
        cells = run.cells()
        if all(run.is_complete(cell) for cell in cells):
            on_progress(f"{run.path} is complete: there is nothing to resume")
            return Outcome(done=len(cells), failed=0)
        check_unchanged(run)
        with signals_interrupt(), open_network(run.plan) as network:
            return execute(run, network, jobs=jobs, device=device, on_progress=on_progress)


def complete(run: RunDir, *, jobs: int = 1, device: str | None = None, on_progress: OnProgress) -> int:
    """Run the incomplete cells of a run until all of them are complete; returns their number. Arguments: `run_cells`.

    Raises:
        FailedCellsError: some cells failed.
        WdmoeError: as `run_cells`.
    """
    outcome = run_cells(run, jobs=jobs, device=device, on_progress=on_progress)
    if outcome.failed:
        raise FailedCellsError(
            f"{outcome.failed} of {outcome.done + outcome.failed} cells failed: 'wdmoe-testbed status {run.path}' "
            f"shows why, 'wdmoe-testbed resume {run.path}' tries them again"
        )
    return outcome.done


def check_unchanged(run: RunDir) -> None:
    """Check that bundles, data sets and network are those of the run's complete cells.

    Raises:
        RunDirectoryError: a file has changed or is missing; the message names all of them.
    """
    manifest = run.manifest
    wanted = {Path(bundle.path) / MANIFEST_NAME: bundle.manifest_sha256 for bundle in manifest.bundles}
    wanted |= {Path(path): sha256 for path, sha256 in manifest.datasets.items()}
    changed = [path for path, sha256 in wanted.items() if not path.is_file() or sha256_file(path) != sha256]
    if run.plan.emulated:
        network = Path(run.plan.emulated)
        changed += [network] if not network.is_file() or network.read_text(encoding="utf-8") != manifest.network else []
    if changed:
        differ = ", ".join(f"{path} {'has changed' if path.exists() else 'is missing'}" for path in changed)
        raise RunDirectoryError(
            f"can't resume {run.path}, new cells would not be comparable: {differ} since the run began; restore the "
            "old file, or start a new run"
        )


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does: events are written and child processes ended.

    That takes a while, so a message is printed at once. In a thread nothing changes: signals are the main thread's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def say_and_interrupt(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            # Not print: the signal may have interrupted one, and its buffer is not re-entrant.
            with suppress(OSError):
                os.write(sys.stderr.fileno(), _STOPPING)
        interrupt(number, frame)

    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, say_and_interrupt) for number in handled}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
