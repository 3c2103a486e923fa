"""`wdmoe-testbed bench`."""

from pathlib import Path

import click

from common.options import Command
from testbed.bench.sections.registry import SECTIONS


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(bench)


@click.command(cls=Command, example="wdmoe-testbed bench --section decode")
@click.option(
    "--broker", default="mosquitto", show_default=True,
    help="MQTT broker for sections on loopback: embedded, mosquitto, or an mqtt:// URL.",
)  # fmt: skip
@click.option(
    "--section", "sections", multiple=True, type=click.Choice(list(SECTIONS)),
    help="Section to run; repeatable.  [default: all]",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(10), default=300, show_default=True,
    help="Samples per row; rows whose samples take long take fewer.",
)  # fmt: skip
@click.option(
    "--busy", type=click.IntRange(1, 256), default=8, show_default=True,
    help="Busy processes beside which the section load decodes.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/bench.json"), show_default=True,
    help="File for the raw samples; plots and logs go into a folder beside it.",
)  # fmt: skip
@click.option(
    "--checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="For the section export: folder of the checkpoint.  [default: 0.7 GB of random weights]",
)  # fmt: skip
@click.option(
    "--device", default="cpu", show_default=True,
    help="Device of the trunk, as wdmoe-bs takes it, for sections that decode on an emulated network.",
)  # fmt: skip
def bench(
    broker: str, sections: tuple[str, ...], samples: int, busy: int, out: Path, checkpoint: Path | None, device: str
) -> None:
    """Measure speeds as ratios to what the hardware allows."""
    from rich.console import Console

    from testbed.bench.rows import Settings
    from testbed.bench.run import run_bench

    settings = Settings(
        broker=broker, samples=samples, busy=busy, folder=out.with_suffix(""), console=Console(), checkpoint=checkpoint,
        device=device,
    )  # fmt: skip
    run_bench(settings, sections, out)
