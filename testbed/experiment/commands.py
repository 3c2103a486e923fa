"""The commands of `wdmoe-testbed` around experiments. Heavy imports wait until a command needs them."""

import time
from pathlib import Path

import click

from wire.errors import FailedCellsError, PreflightError

_PLAN = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
_RUN = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
_DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder of the data sets that a plan names.")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (plan, preflight, run, resume, status, report, compare):
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


@click.command()
@_PLAN
@_DATA
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Where the run's folder would be.")
def preflight(plan_path: Path, data: Path | None, out: Path) -> None:
    """Check whether a plan can be run here and now; changes nothing."""
    from rich.console import Console

    from testbed.experiment.plan import read_plan
    from testbed.report.preflight import preflight as ask
    from testbed.report.preflight import print_checks

    checks = ask(read_plan(plan_path, data=data), out=out)
    print_checks(checks, Console())
    if failed := [check for check in checks if check.level == "fail"]:
        raise PreflightError(
            f"{len(failed)} of {len(checks)} checks failed, the first: {failed[0].name}: {failed[0].detail}"
        )


@click.command()
@_RUN
@click.option("--resamples", type=click.IntRange(100), default=2000, show_default=True, help="Of each interval.")
@click.option("--trace-tokens", type=click.IntRange(1), default=4, show_default=True, help="Of each cell in the trace.")
def report(folder: Path, resamples: int, trace_tokens: int) -> None:
    """Write merged tables, summary, plots, trace and report into a run's folder."""
    from testbed.experiment.rundir import RunDir
    from testbed.report.contents import warnings
    from testbed.report.write import PAGE, write_report

    summary = write_report(RunDir(folder), resamples=resamples, trace_tokens=trace_tokens)
    for warning in warnings(summary):
        click.echo(warning)
    click.echo(f"{summary.complete_cells} of {summary.planned_cells} cells: {folder / PAGE}")


@click.command()
@click.argument("folders", metavar="RUN RUN…", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--resamples", type=click.IntRange(100), default=2000, show_default=True, help="Of each interval.")
def compare(folders: tuple[Path, ...], resamples: int) -> None:
    """Compare runs with the first one, policy by policy, in markdown."""
    from testbed.experiment.rundir import RunDir
    from testbed.report.compare import compare_runs
    from testbed.report.document import table_markdown

    if len(folders) < 2:
        raise click.UsageError("name at least two runs")
    notes, tables = compare_runs([RunDir(folder) for folder in folders], resamples=resamples)
    for number, folder in enumerate(folders, 1):
        click.echo(f"run {number}: {folder}")
    for note in notes or ["no differences in code, plan, bundles, data, machine or versions"]:
        click.echo(f"- {note}")
    for title, table in tables:
        click.echo(f"\n{title}\n\n{table_markdown(table)}")


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
