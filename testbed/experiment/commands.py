"""The commands of `wdmoe-testbed` around experiments. Heavy imports wait until a command needs them."""

import time
from pathlib import Path

import click

from wire.errors import FailedCellsError

_PLAN = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
_RUN = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
_DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder of the data sets that a plan names.")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (plan, run, resume, status):
        group.add_command(command)


@click.command()
@_PLAN
@_DATA
@click.option("--dry-run", is_flag=True, help="List every cell.")
def plan(plan_path: Path, data: Path | None, dry_run: bool) -> None:
    """Check a plan and say what it comes to; runs nothing."""
    from testbed.experiment.estimate import describe
    from testbed.experiment.plan import expand, read_plan

    read = read_plan(plan_path, data=data)
    if dry_run:
        for cell in expand(read):
            click.echo(f"{cell.id}  {cell}")
    for line in describe(read):
        click.echo(line)


@click.command()
@_PLAN
@_DATA
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder; default runs/NAME-TIME.")
def run(plan_path: Path, data: Path | None, out: Path | None) -> None:
    """Run an experiment."""
    from rich.console import Console

    from testbed.experiment.plan import read_plan
    from testbed.experiment.start import create_run

    plan = read_plan(plan_path, data=data)
    folder = out or Path("runs") / time.strftime(f"{plan.name}-%Y%m%d-%H%M%S")
    create_run(plan, folder, console=Console(stderr=True))
    click.echo(f"run folder: {folder}")
    _run(folder)


@click.command()
@_RUN
def resume(folder: Path) -> None:
    """Go on with a run that was interrupted; cells that failed are tried again."""
    _run(folder)


@click.command()
@_RUN
def status(folder: Path) -> None:
    """Say how far a run is and what failed."""
    from testbed.experiment.rundir import RunDir
    from testbed.experiment.status import lines, status_of

    for line in lines(status_of(RunDir(folder))):
        click.echo(line)


def _run(folder: Path) -> None:
    from testbed.experiment.rundir import RunDir
    from testbed.experiment.start import run_cells

    outcome = run_cells(RunDir(folder), say=click.echo)
    if outcome.failed:
        raise FailedCellsError(
            f"{outcome.failed} of {outcome.done + outcome.failed} cells failed: 'wdmoe-testbed status {folder}' says "
            f"why, 'wdmoe-testbed resume {folder}' tries them again"
        )
    click.echo(f"{outcome.done} cells are complete: wdmoe-testbed report {folder}")
