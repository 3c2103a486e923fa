"""`wdmoe-testbed status` and `note`. Heavy imports wait until a command needs them."""

from pathlib import Path

import click

from common.console import printable
from common.json_output import json_option, print_json
from common.options import Command

RUN = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))


@click.command(cls=Command, example="wdmoe-testbed status runs/mine --follow")
@RUN
@click.option("--follow", "-f", "following", is_flag=True, help="Keep showing the progress until the run stops.")
@json_option
def status(folder: Path, following: bool, as_json: bool) -> None:
    """Show how far a run is and what failed."""
    from testbed.run_directory.directory import RunDir
    from testbed.run_directory.status import lines, status_of

    if following and as_json:
        raise click.UsageError("--json shows the present state: leave out --follow")
    if following:
        from rich.console import Console

        from testbed.run_directory.follow import follow

        follow(RunDir(folder), Console(highlight=False))
        return
    now = status_of(RunDir(folder))
    if as_json:
        print_json(now)
        return
    for line in lines(now):
        click.echo(printable(line))


@click.command(cls=Command, example="wdmoe-testbed note runs/mine 'moved pi3 to the window' --photo window.jpg")
@RUN
@click.argument("text")
@click.option("--photo", type=click.Path(path_type=Path), help="Copied into the run's folder.")
def note(folder: Path, text: str, photo: Path | None) -> None:
    """Add an operator's note to a run, also while it goes on."""
    from testbed.run_directory.directory import RunDir
    from testbed.run_directory.notes import add_note

    add_note(RunDir(folder), text, photo=photo)


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    for command in (status, note):
        group.add_command(command)
