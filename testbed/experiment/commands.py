"""The commands of `wdmoe-testbed` around experiments. Heavy imports wait until a command needs them."""

import time
from pathlib import Path

import click

from testbed.errors import FailedCellsError, PreflightError

_PLAN = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
_RUN = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
_DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder of the data sets that a plan names.")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (plan, preflight, run, resume, status, note, report, compare, export):
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
@click.option("--prepare", is_flag=True, help="Make the folder only; 'resume' begins it.")
def run(plan_path: Path, data: Path | None, out: Path | None, prepare: bool) -> None:
    """Run an experiment."""
    from rich.console import Console

    from testbed.experiment.plan import read_plan
    from testbed.experiment.start import create_run

    plan = read_plan(plan_path, data=data)
    folder = out or Path("runs") / time.strftime(f"{plan.name}-%Y%m%d-%H%M%S")
    create_run(plan, folder, console=Console(stderr=True))
    click.echo(f"run folder: {folder}")
    if not prepare:
        _run(folder)


@click.command()
@_RUN
def resume(folder: Path) -> None:
    """Go on with a run that was interrupted; cells that failed are tried again."""
    _run(folder)


@click.command()
@_RUN
@click.option("--follow", "-f", "following", is_flag=True, help="Keep showing it until nobody runs it any more.")
def status(folder: Path, following: bool) -> None:
    """Say how far a run is and what failed."""
    from testbed.experiment.rundir import RunDir
    from testbed.experiment.status import lines, status_of

    if following:
        from rich.console import Console

        from testbed.experiment.follow import follow

        follow(RunDir(folder), Console(highlight=False))
        return
    for line in lines(status_of(RunDir(folder))):
        click.echo(line)


@click.command()
@_RUN
@click.argument("text")
@click.option("--photo", type=click.Path(path_type=Path), help="Copied into the run's folder.")
def note(folder: Path, text: str, photo: Path | None) -> None:
    """Add an operator's note to a run, also while it goes on."""
    from testbed.experiment.notes import add_note
    from testbed.experiment.rundir import RunDir

    add_note(RunDir(folder), text, photo=photo)


@click.command()
@_PLAN
@_DATA
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Where the run's folder would be.")
@click.option("--keys", type=click.Path(path_type=Path), help="Folder of 'keys', for when certificates run out.")
@click.option("--quick", is_flag=True, help="Start no nodes, measure no rates.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def preflight(plan_path: Path, data: Path | None, out: Path, keys: Path | None, quick: bool, as_json: bool) -> None:
    """Check whether a plan can be run here and now, node by node; what it starts, it ends."""
    import msgspec
    from rich.console import Console

    from testbed.experiment.plan import read_plan
    from testbed.preflight.preflight import preflight as ask
    from testbed.preflight.preflight import print_checks

    plan = read_plan(plan_path, data=data)
    with Console(stderr=True).status("preflight") as status:
        checks = ask(plan, out=out, keys=keys, quick=quick, say=lambda line: status.update(f"preflight: {line}"))
    if as_json:
        click.echo(msgspec.json.encode(checks))
    else:
        print_checks(checks, Console())
    if failed := [check for check in checks if check.level == "fail"]:
        first = failed[0]
        of = f"node {first.node}, " if first.node else ""
        raise PreflightError(
            f"{len(failed)} of {len(checks)} checks failed, the first: {of}{first.name}: {first.detail}"
        )


@click.command()
@_RUN
@click.option("--out", type=click.Path(path_type=Path), help="Of an archive: the folder to unpack it to.")
@click.option("--resamples", type=click.IntRange(100), default=2000, show_default=True, help="Of each interval.")
@click.option("--trace-tokens", type=click.IntRange(1), default=4, show_default=True, help="Of each cell in the trace.")
def report(folder: Path, out: Path | None, resamples: int, trace_tokens: int) -> None:
    """Write merged tables, summary, plots, trace and report into a run's folder; RUN may be an archive."""
    from testbed.archive.export import archive_name
    from testbed.archive.unpack import is_archive, unpack
    from testbed.experiment.rundir import RunDir
    from testbed.report.contents import warnings
    from testbed.report.write import PAGE, write_report

    if is_archive(folder):
        folder = unpack(folder, out or Path(archive_name(folder)))
    elif out is not None:
        raise click.UsageError("--out is for archives: a folder's report is written into it")
    summary = write_report(RunDir(folder), resamples=resamples, trace_tokens=trace_tokens)
    for warning in warnings(summary):
        click.echo(warning)
    click.echo(f"{summary.complete_cells} of {summary.planned_cells} cells: {folder / PAGE}")


@click.command()
@click.argument("folders", metavar="RUN RUN…", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--resamples", type=click.IntRange(100), default=2000, show_default=True, help="Of each interval.")
def compare(folders: tuple[Path, ...], resamples: int) -> None:
    """Compare runs with the first one, policy by policy, in markdown; each RUN is a folder or an archive."""
    from contextlib import ExitStack

    from testbed.archive.unpack import opened
    from testbed.report.compare import compare_runs
    from testbed.report.document import table_markdown

    if len(folders) < 2:
        raise click.UsageError("name at least two runs")
    with ExitStack() as stack:
        runs = [stack.enter_context(opened(folder)) for folder in folders]
        notes, tables = compare_runs(runs, resamples=resamples)
    for number, folder in enumerate(folders, 1):
        click.echo(f"run {number}: {folder}")
    for note in notes or ["no differences in code, plan, bundles, data, machine or versions"]:
        click.echo(f"- {note}")
    for title, table in tables:
        click.echo(f"\n{title}\n\n{table_markdown(table)}")


@click.command()
@_RUN
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Ends in .tar.zst or .tar.gz.")
@click.option("--plain", is_flag=True, help="Keep names of networks, addresses, hosts and users.")
@click.option("--key", type=click.Path(path_type=Path), help="Of the pseudonyms, mode 600.  [default: your own]")
@click.option("--photos/--no-photos", default=True, show_default=True)
@click.option("--report/--no-report", "with_report", default=True, show_default=True)
def export(folder: Path, out: Path, plain: bool, key: Path | None, photos: bool, with_report: bool) -> None:
    """Pack a run into one archive with checksums and a data dictionary, ready to publish."""
    from testbed.archive.export import export_run
    from testbed.experiment.rundir import RunDir

    made = export_run(RunDir(folder), out, anonymous=not plain, key_file=key, photos=photos, report=with_report)
    click.echo(f"{made.path}: {made.files} files, {made.bytes / 2**20:.1f} MiB, SHA-256 {made.sha256}")
    if not plain:
        counts = ", ".join(f"{count} {kind}" for kind, count in made.replaced.items())
        click.echo(f"replaced by pseudonyms: {counts}; read notes and logs before you publish them")
    if made.photos:
        click.echo(f"{made.photos} photos are in it: look at them before you publish them")
    for line in made.left_out:
        click.echo(f"left out: {line}")


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
