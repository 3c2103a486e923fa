"""`wdmoe-testbed arm`."""

from pathlib import Path

import click

from common.options import Command
from testbed.evaluation.variants import VARIANTS
from testbed.proof.arm.boards import BOARDS


def register(cli: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    cli.add_command(arm)


@click.command(cls=Command, example="wdmoe-testbed arm --variant int4-b32")
@click.option(
    "--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)),
    help="Quantisation to compare; repeatable.  [default: all]",
)  # fmt: skip
@click.option(
    "--board", "boards", multiple=True, type=click.Choice([b.name for b in BOARDS]),
    help="Board to emulate; repeatable.  [default: all]",
)  # fmt: skip
@click.option("--experts", default="L*:E*", show_default=True, help="Experts to compare.")
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="Layers of the demo model.")
@click.option("--rows", type=click.IntRange(1, 64), default=6, show_default=True, help="Hidden states per expert.")
@click.option("--tokens", type=click.IntRange(0), default=8, show_default=True, help="Tokens to generate.")
@click.option(
    "--apt-sources", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of apt sources with arm64, if this system's have none.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/arm"), show_default=True, help="Folder for results."
)
def arm(
    variants: tuple[str, ...], boards: tuple[str, ...], experts: str, layers: int, rows: int, tokens: int,
    apt_sources: Path | None, out: Path,
) -> None:  # fmt: skip
    """Run nodes from aarch64 wheels on emulated boards, and compare their answers with this machine's."""
    from rich.console import Console

    from testbed.proof.arm.run import Settings, run_arm

    settings = Settings(
        variants=variants or tuple(VARIANTS),
        boards=[board for board in BOARDS if not boards or board.name in boards],
        experts=experts,
        layers=layers,
        rows=rows,
        tokens=tokens,
        apt_sources=apt_sources,
        out=out,
    )
    run_arm(settings, Console(highlight=False))
