"""`wdmoe-testbed twin`."""

from pathlib import Path
from typing import get_args

import click

from common.options import Command
from testbed.twin.shapes import TwinName


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(twin)


@click.command(cls=Command, example="wdmoe-testbed twin qwen3-30b-a3b twin --layers 2")
@click.argument("model", type=click.Choice(get_args(TwinName)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random weights.")
def twin(model: TwinName, out: Path, layers: int | None, seed: int) -> None:
    """Write a checkpoint with MODEL's exact shape and random weights to OUT.

    To try sizes and times without a download: it exports and runs like the real model, but its answers are nonsense.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from common.sizes import readable_bytes
    from testbed.twin.write import write_twin

    columns = (TextColumn("weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("weights", total=None)
        try:
            size = write_twin(
                out, model, layers=layers, seed=seed,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    click.echo(f"{model}: {readable_bytes(size)} of weights in {out}")
