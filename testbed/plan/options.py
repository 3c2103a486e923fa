"""Arguments of all commands that read a plan."""

from pathlib import Path

import click

PLAN = click.argument("plan_path", metavar="PLAN", type=click.Path(path_type=Path))
DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder of the data sets that the plan names.")
