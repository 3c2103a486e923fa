"""`wdmoe-testbed report` and `compare`. Heavy imports wait until a command needs them."""

from pathlib import Path

import click

from common.console import printable
from common.options import Command
from testbed.run_directory.commands import RUN

_RESAMPLES = click.option(
    "--resamples", type=click.IntRange(100), default=2000, show_default=True, help="Bootstrap resamples per interval."
)


@click.command(cls=Command, example="wdmoe-testbed report runs/policies")
@RUN
@click.option("--out", type=click.Path(path_type=Path), help="If RUN is an archive: the folder to unpack it to.")
@_RESAMPLES
@click.option(
    "--trace-tokens", type=click.IntRange(1), default=4, show_default=True, help="Tokens of each cell in the trace."
)
def report(folder: Path, out: Path | None, resamples: int, trace_tokens: int) -> None:
    """Write merged tables, summary, plots, trace and report into a run's folder; RUN may be an archive."""
    from testbed.report.page.contents import warnings
    from testbed.report.write import PAGE, write_report
    from testbed.run_directory.archive_file import archive_name
    from testbed.run_directory.directory import RunDir
    from testbed.run_directory.unpack import is_archive, unpack

    if is_archive(folder):
        folder = unpack(folder, out or Path(archive_name(folder)))
    elif out is not None:
        raise click.UsageError("--out is only for archives: the report of a folder is written into that folder")
    summary = write_report(RunDir(folder), resamples=resamples, trace_tokens=trace_tokens)
    for warning in warnings(summary):
        click.echo(printable(warning))
    click.echo(f"{summary.complete_cells} of {summary.planned_cells} cells: {folder / PAGE}")


@click.command(cls=Command, example="wdmoe-testbed compare runs/before runs/after")
@click.argument("folders", metavar="RUN RUN…", type=click.Path(path_type=Path), nargs=-1, required=True)
@_RESAMPLES
def compare(folders: tuple[Path, ...], resamples: int) -> None:
    """Compare runs with the first one, policy by policy, in Markdown; each RUN is a folder or an archive."""
    from contextlib import ExitStack

    from testbed.report.compare import compare_runs
    from testbed.report.page.document import table_markdown
    from testbed.run_directory.unpack import opened

    if len(folders) < 2:
        raise click.UsageError("name at least two runs")
    with ExitStack() as stack:
        runs = [stack.enter_context(opened(folder)) for folder in folders]
        notes, tables = compare_runs(runs, resamples=resamples)
    for number, folder in enumerate(folders, 1):
        click.echo(f"run {number}: {folder}")
    for note in notes or ["no differences in code, plan, bundles, data, machine or versions"]:
        click.echo(printable(f"- {note}"))
    for title, table in tables:
        click.echo(f"\n{title}\n\n{table_markdown(table)}")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (report, compare):
        group.add_command(command)
