"""`wdmoe-testbed preflight`. Heavy imports wait until the command needs them."""

from pathlib import Path

import click

from common.options import Command
from common.progress import show_stages
from testbed.errors import PreflightError
from testbed.plan.commands import DATA, PLAN


@click.command(cls=Command, example="wdmoe-testbed preflight plan.yaml --quick")
@PLAN
@DATA
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Where the run's folder would be.")
@click.option("--keys", type=click.Path(path_type=Path), help="Folder of 'keys': also checks when certificates expire.")
@click.option("--quick", is_flag=True, help="Start no nodes and measure no rates.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def preflight(plan_path: Path, data: Path | None, out: Path, keys: Path | None, quick: bool, as_json: bool) -> None:
    """Check whether a plan can run here and now, node by node. Whatever it starts, it stops again."""
    import msgspec
    from rich.console import Console

    from testbed.plan.reading import read_plan
    from testbed.preflight.preflight import print_checks, run_preflight

    plan = read_plan(plan_path, data=data)
    with show_stages("preflight") as show:
        checks = run_preflight(plan, out=out, keys=keys, quick=quick, on_progress=show)
    if as_json:
        click.echo(msgspec.json.encode(checks))
    else:
        print_checks(checks, Console())
    if failed := [check for check in checks if check.level == "fail"]:
        first = failed[0]
        subject = f"node {first.node}, " if first.node else ""
        raise PreflightError(
            f"{len(failed)} of {len(checks)} checks failed, the first: {subject}{first.name}: {first.detail}"
        )


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(preflight)
