"""`wdmoe-testbed whole-shape`."""

from pathlib import Path
from typing import get_args

import click

from common.cores import usable_cores
from common.options import Command
from testbed.twin.shapes import TwinName


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(whole_shape)


@click.command("whole-shape", cls=Command, example="wdmoe-testbed whole-shape mixtral-8x7b runs/shape")
@click.argument("model", type=click.Choice(get_args(TwinName)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scratch", type=click.Path(path_type=Path),
    help="New folder for the bundle, 32 GB for all layers; one under /dev/shm keeps it in RAM.  [default: OUT/bundle]",
)  # fmt: skip
@click.option("--layers", type=click.IntRange(1), help="Number of layers.  [default: all]")
@click.option("--nodes", type=click.IntRange(1), default=8, show_default=True, help="Node processes.")
@click.option(
    "--slices", type=click.IntRange(1), multiple=True, default=(1, 2, 4), show_default=True,
    help="Slices to cut each expert into; repeatable.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Steps per measurement.")
@click.option("--jobs", type=click.IntRange(1), help="Processes that write the bundle.  [default: one per core]")
@click.option("--device", help="Device of the trunk, as wdmoe-bs takes it.  [default: cuda if there is one]")
def whole_shape(
    model: TwinName, out: Path, scratch: Path | None, layers: int | None, nodes: int, slices: tuple[int, ...],
    steps: int, jobs: int | None, device: str | None,
) -> None:  # fmt: skip
    """Measure MODEL's whole shape in int4 with random weights on nodes with a core each, as root.

    Whole and sliced experts, links of 50 and 100 Mbit/s at 2 and 5 ms, dedicated and shared, batches and drafts.
    Results go to OUT. After an interruption, the same command continues with what is missing there.
    """
    from testbed.bench.system import why_not
    from testbed.errors import PrivilegeError
    from testbed.whole_shape.run import TABLE, run_whole_shape

    if why := why_not():
        raise PrivilegeError(why)
    try:
        run_whole_shape(
            model, out, scratch or out / "bundle", layers=layers, nodes=nodes, slices=slices, steps=steps,
            jobs=jobs or usable_cores(), device=device, on_progress=click.echo,
        )  # fmt: skip
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"results: {out / TABLE}")
