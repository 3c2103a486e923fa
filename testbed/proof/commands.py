"""The commands of `wdmoe-testbed` that prove the software. Only a clone has them: this folder is not in the wheel."""

from pathlib import Path

import click

from common.options import Command
from testbed.proof.arm import commands as arm_commands
from testbed.proof.chaos import commands as chaos_commands
from testbed.proof.machines import commands as machines_commands


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    chaos_commands.register(group)
    arm_commands.register(group)
    machines_commands.register(group)
    group.add_command(link_accuracy)


@click.command("link-accuracy", cls=Command, example="wdmoe-testbed link-accuracy network.yaml")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", multiple=True, help="Profile to measure; repeatable.  [default: all]")
@click.option(
    "--seconds", type=click.FloatRange(5), default=25.0, show_default=True, help="Seconds of messages per profile."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/link-accuracy.json"), show_default=True,
    help="File for the results.",
)  # fmt: skip
def link_accuracy(spec: Path, profiles: tuple[str, ...], seconds: float, out: Path) -> None:
    """Compare link estimates with the emulated links of SPEC.

    Also with iperf3, and with how long the next messages take.
    """
    from rich.console import Console

    from testbed.demo_assets import demo_bundle
    from testbed.proof.link_accuracy import measure_accuracy

    console = Console()
    measure_accuracy(spec, demo_bundle("int4", console=console), profiles, seconds=seconds, out=out, console=console)
