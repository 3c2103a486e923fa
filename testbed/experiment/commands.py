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
    for command in (run, resume):
        group.add_command(command)


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
