"""`wdmoe-testbed plan`. Heavy imports wait until the command needs them."""

from pathlib import Path

import click

from common.options import Command

PLAN = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder of the data sets that the plan names.")


@click.command(cls=Command, example="wdmoe-testbed plan plan.yaml --dry-run")
@PLAN
@DATA
@click.option("--dry-run", is_flag=True, help="List every cell.")
def plan(plan_path: Path, data: Path | None, dry_run: bool) -> None:
    """Check a plan and show what it comes to, without running anything."""
    from testbed.plan.cells import expand
    from testbed.plan.estimate import describe
    from testbed.plan.reading import read_plan

    read = read_plan(plan_path, data=data)
    if dry_run:
        for cell in expand(read):
            click.echo(f"{cell.id}  {cell}")
    for line in describe(read):
        click.echo(line)


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(plan)
