"""`wdmoe-testbed plan`, `preflight` and `doctor`. Heavy imports wait until the command needs them."""

from pathlib import Path

import click

from common.json_output import json_option, print_json
from common.options import Command
from common.progress import show_stages
from testbed.errors import PreflightError
from testbed.plan.options import DATA, PLAN


@click.command(cls=Command, example="wdmoe-testbed plan plan.yaml --dry-run")
@PLAN
@DATA
@click.option("--dry-run", is_flag=True, help="List every cell.")
def plan(plan_path: Path, data: Path | None, dry_run: bool) -> None:
    """Check a plan and show its size, without running anything."""
    from testbed.experiment.plan_files import check_data_sets, check_files
    from testbed.plan.cells import expand
    from testbed.plan.estimate import describe
    from testbed.plan.reading import read_plan

    read = read_plan(plan_path, data=data)
    check_files(read)
    if data is not None:
        check_data_sets(read)
    if dry_run:
        for cell in expand(read):
            click.echo(f"{cell.id}  {cell}")
    for line in describe(read):
        click.echo(line)


@click.command(cls=Command, example="wdmoe-testbed preflight plan.yaml --quick")
@PLAN
@DATA
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Where the run's folder would be.")
@click.option("--keys", type=click.Path(path_type=Path), help="Folder of 'keys': also checks when certificates expire.")
@click.option("--quick", is_flag=True, help="Start no nodes and measure no rates.")
@json_option
def preflight(plan_path: Path, data: Path | None, out: Path, keys: Path | None, quick: bool, as_json: bool) -> None:
    """Check whether a plan can run here and now, node by node. Whatever it starts, it stops again."""
    from rich.console import Console

    from testbed.plan.reading import read_plan
    from testbed.preflight.preflight import print_checks, run_preflight

    read = read_plan(plan_path, data=data)
    with show_stages("preflight") as show:
        checks = run_preflight(read, out=out, keys=keys, quick=quick, on_progress=show)
    if as_json:
        print_json(checks)
    else:
        print_checks(checks, Console())
    if failed := [check for check in checks if check.level == "fail"]:
        first = failed[0]
        subject = f"node {first.node}, " if first.node else ""
        raise PreflightError(
            f"{len(failed)} of {len(checks)} checks failed, the first: {subject}{first.name}: {first.detail}"
        )


@click.command(cls=Command, example="wdmoe-testbed doctor")
@json_option
def doctor(as_json: bool) -> int:
    """Show what this machine lacks, and what would make it faster.

    The exit code is 1 if something is missing that the demo needs.
    """
    from testbed.preflight.doctor import examine

    checks = examine()
    if as_json:
        print_json(checks)
    else:
        for check in checks:
            click.echo(f"{'ok' if check.level == 'pass' else check.level:<8}{check.name:<16}{check.detail}")
    return int(any(check.level == "fail" for check in checks))


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(plan)
    group.add_command(doctor)
    group.add_command(preflight)
