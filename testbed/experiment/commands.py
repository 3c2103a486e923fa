"""`wdmoe-testbed run` and `resume`. Heavy imports wait until a command needs them."""

import time
from pathlib import Path

import click

from common.options import Command
from testbed.plan.options import DATA, PLAN
from testbed.run_directory.commands import RUN

JOBS = click.option(
    "--jobs", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Processes for cells without nodes, each of which loads the model.",
)  # fmt: skip
GPU = click.option(
    "--gpu", "device", flag_value="cuda",
    help="Compute the experts of cells without nodes on the GPUs, with activations in float32.",
)  # fmt: skip


@click.command(cls=Command, example="wdmoe-testbed run plan.yaml --data data --out runs/mine")
@PLAN
@DATA
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME-TIME]")
@click.option("--items", type=click.IntRange(1), help="Use at most this many items of each data set.")
@JOBS
@GPU
@click.option("--prepare", is_flag=True, help="Only make the folder; 'resume' starts the run.")
def run(
    plan_path: Path,
    data: Path | None,
    out: Path | None,
    items: int | None,
    jobs: int,
    device: str | None,
    prepare: bool,
) -> None:
    """Run an experiment."""
    from rich.console import Console

    from testbed.plan.reading import at_most, read_plan
    from testbed.run_directory.directory import RunDir

    plan = read_plan(plan_path, data=data)
    if items is not None:
        plan = at_most(plan, items)
    folder = out or Path("runs") / time.strftime(f"{plan.name}-%Y%m%d-%H%M%S")
    RunDir.check_new(folder)
    # Later, because torch is slow to import.
    from testbed.evaluation.torch_runtime import check_device
    from testbed.experiment.start import create_run

    check_device(device)
    create_run(plan, folder, console=Console(stderr=True))
    click.echo(f"run folder: {folder}")
    if not prepare:
        _run(folder, jobs, device)


@click.command(cls=Command, example="wdmoe-testbed resume runs/mine")
@RUN
@JOBS
@GPU
def resume(folder: Path, jobs: int, device: str | None) -> None:
    """Continue an interrupted run; failed cells are tried again."""
    _run(folder, jobs, device)


def _run(folder: Path, jobs: int, device: str | None) -> None:
    from testbed.evaluation.torch_runtime import check_device
    from testbed.experiment.start import complete
    from testbed.run_directory.directory import RunDir

    check_device(device)
    done = complete(RunDir(folder), jobs=jobs, device=device, on_progress=click.echo)
    click.echo(f"{done} cells are complete: wdmoe-testbed report {folder}")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (run, resume):
        group.add_command(command)
