"""`wdmoe-testbed run` and `resume`. Heavy imports wait until a command needs them."""

import time
from pathlib import Path

import click

from common.options import Command
from testbed.errors import FailedCellsError
from testbed.plan.commands import DATA, PLAN
from testbed.run_directory.commands import RUN

JOBS = click.option(
    "--jobs", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Processes for cells without nodes, each of which loads the model.",
)  # fmt: skip


@click.command(cls=Command, example="wdmoe-testbed run plan.yaml --data data --out runs/mine")
@PLAN
@DATA
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME-TIME]")
@click.option("--items", type=click.IntRange(1), help="Use at most this many items of each data set.")
@JOBS
@click.option("--prepare", is_flag=True, help="Only make the folder; 'resume' starts the run.")
def run(plan_path: Path, data: Path | None, out: Path | None, items: int | None, jobs: int, prepare: bool) -> None:
    """Run an experiment."""
    from rich.console import Console

    from testbed.experiment.start import create_run
    from testbed.plan.reading import at_most, read_plan

    plan = read_plan(plan_path, data=data)
    if items is not None:
        plan = at_most(plan, items)
    folder = out or Path("runs") / time.strftime(f"{plan.name}-%Y%m%d-%H%M%S")
    create_run(plan, folder, console=Console(stderr=True))
    click.echo(f"run folder: {folder}")
    if not prepare:
        _run(folder, jobs)


@click.command(cls=Command, example="wdmoe-testbed resume runs/mine")
@RUN
@JOBS
def resume(folder: Path, jobs: int) -> None:
    """Continue an interrupted run; failed cells are tried again."""
    _run(folder, jobs)


def _run(folder: Path, jobs: int) -> None:
    from testbed.experiment.start import run_cells
    from testbed.run_directory.directory import RunDir

    outcome = run_cells(RunDir(folder), jobs=jobs, on_progress=click.echo)
    if outcome.failed:
        raise FailedCellsError(
            f"{outcome.failed} of {outcome.done + outcome.failed} cells failed: 'wdmoe-testbed status {folder}' shows "
            f"why, 'wdmoe-testbed resume {folder}' tries them again"
        )
    click.echo(f"{outcome.done} cells are complete: wdmoe-testbed report {folder}")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (run, resume):
        group.add_command(command)
