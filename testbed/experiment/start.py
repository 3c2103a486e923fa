"""From a plan to a run's folder, and from a folder to a running executor."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.console import Console

from exporter.presets import DEFAULT_BLOCK
from testbed.demo_assets import demo_bundle
from testbed.errors import PlanError, RunDirectoryError
from testbed.experiment import facts
from testbed.experiment.networks import check_network, open_network
from testbed.experiment.plan import Choice, Perplexity, Plan, check_plan, expand
from testbed.experiment.rundir import SCHEMA, BundleFacts, RunDir, RunManifest
from testbed.experiment.runner import Outcome, Say, execute
from testbed.experiment.site import broker_of
from testbed.network.namespaces import check_privileges
from wire.manifest import MANIFEST_NAME, Scheme, load_manifest, sha256_file

SCHEMES: tuple[Scheme, ...] = ("int4", "int8", "int8-dynamic", "fp16", "fp32")
_STOPPING = b"stopping: the cell in progress is given up; 'resume' does it again\n"
_AGAIN_S = 0.02


def create_run(plan: Plan, out: Path, *, console: Console) -> RunDir:
    """Make bundles ready and write the manifest.

    Raises:
        PlanError: a bundle or data set of the plan is missing.
        RunDirectoryError: `out` is not empty.
        PrivilegeError: this process may not bring up the plan's network.
    """
    if plan.emulated:
        check_privileges()
    bundles = [bundle_facts(name, console=console) for name in plan.bundles]
    for bundle in bundles:
        check_policies(plan, bundle)
        check_network(plan, bundle.experts)
    datasets = {w.dataset for w in plan.workloads if isinstance(w, Choice | Perplexity) and w.dataset is not None}
    if missing := sorted(path for path in datasets if not Path(path).is_file()):
        raise PlanError(f"data set {missing[0]} is missing: say --data DIR, see docs/experiments.md")
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
        datasets={path: sha256_file(Path(path)) for path in sorted(datasets)},
        network=Path(plan.emulated).read_text() if plan.emulated else "",
        versions=facts.versions(),
        machine=facts.machine(),
        power=facts.power(),
        wifi=facts.wifi(),
    )
    return RunDir.create(out, manifest)


def check_policies(plan: Plan, bundle: BundleFacts) -> None:
    """Check the plan again, now that the model is known.

    Raises:
        PlanError: a policy does not suit the model.
    """
    try:
        check_plan(plan, top_k=bundle.top_k)
    except ValueError as error:
        raise PlanError(f"{plan.name}: {error}") from None


def bundle_facts(name: str, *, console: Console) -> BundleFacts:
    """What a bundle of a plan is; the demo model's are made where they are missing.

    Raises:
        PlanError: there is no such bundle.
        BundleError: its folder is damaged.
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
    """The folder of a bundle of a plan."""
    if "/" in name:
        return Path(name)
    scheme, block = demo_scheme(name)
    return demo_bundle(scheme, block=block, console=console)


def demo_scheme(name: str) -> tuple[Scheme, int]:
    """Scheme and block of a bundle of the demo model, as plans name it.

    Raises:
        PlanError: it is no such name.
    """
    scheme, _, block = name.rpartition("-b") if "-b" in name else (name, "", "")
    for known in SCHEMES:
        if scheme == known and (not block or block.isdigit()):
            return known, int(block) if block else DEFAULT_BLOCK
    raise PlanError(f"bundles: '{name}' is neither a folder (with a /) nor one of {', '.join(SCHEMES)}, …-b128")


def run_cells(run: RunDir, *, say: Say) -> Outcome:
    """Run what is left, holding the folder's lock; of a complete run nothing is started and nothing written.

    Raises:
        RunDirectoryError: somebody else runs it, or what it was begun with has changed.
        NetworkError, PrivilegeError: the plan's network does not come up.
    """
    with run.lock():
        cells = run.cells()
        if all(run.is_complete(cell) for cell in cells):
            say(f"{run.path} is complete: there is nothing to resume")
            return Outcome(done=len(cells), failed=0)
        check_unchanged(run)
        with signals_interrupt(), open_network(run.plan) as network:
            return execute(run, network, say=say)


def check_unchanged(run: RunDir) -> None:
    """Refuse to add cells that were measured on other bundles, data or links than those that are there.

    Raises:
        RunDirectoryError: with the files that are gone or hold something else than at the beginning.
    """
    manifest = run.manifest
    wanted = {Path(bundle.path) / MANIFEST_NAME: bundle.manifest_sha256 for bundle in manifest.bundles}
    wanted |= {Path(path): sha256 for path, sha256 in manifest.datasets.items()}
    odd = [path for path, sha256 in wanted.items() if not path.is_file() or sha256_file(path) != sha256]
    if run.plan.emulated:
        network = Path(run.plan.emulated)
        odd += [network] if not network.is_file() or network.read_text() != manifest.network else []
    if odd:
        differ = ", ".join(f"{path} {'has changed' if path.exists() else 'is missing'}" for path in odd)
        raise RunDirectoryError(
            f"{run.path} can't go on, its cells could not be compared: {differ} since it was begun; put the old file "
            "back, or start a new run"
        )


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does: with its events written and its children ended, which takes a while and so
    is said at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            # Not by print: the signal may have come in the middle of one, whose buffer can't be entered again.
            with suppress(OSError):
                os.write(sys.stderr.fileno(), _STOPPING)
        if _in_finaliser(frame):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
            return
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether an exception that is raised there would be swallowed, and the run go on as if nothing had been."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
