"""`wdmoe-testbed chaos` and `soak`."""

import os
from pathlib import Path

import click

from common.options import Command
from testbed.proof.chaos.schedule import KINDS, LINK_KINDS


def register(cli: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    cli.add_command(chaos)
    cli.add_command(soak)


@click.command(cls=Command, example="wdmoe-testbed chaos --answers 20 --localhost")
@click.option("--answers", type=click.IntRange(1), default=200, show_default=True, help="Number of answers.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same faults.")
@click.option("--tokens", type=click.IntRange(8), default=64, show_default=True, help="Length of each answer.")
@click.option("--nodes", type=click.IntRange(3, 8), default=8, show_default=True, help="Node processes.")
@click.option(
    "--fault", "kinds", multiple=True, type=click.Choice(KINDS), help="Fault to inject; repeatable.  [default: all]"
)
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="Layers of the demo model.")
@click.option("--localhost", is_flag=True, help="Without an emulated network, so without link faults; needs no root.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/chaos"), show_default=True,
    help="Folder for results and logs.",
)  # fmt: skip
def chaos(
    answers: int, seed: int, tokens: int, nodes: int, kinds: tuple[str, ...], layers: int, localhost: bool, out: Path
) -> None:
    """Generate answers while nodes, links, broker and base station fail; each must end, and say if it is degraded.

    Tokens are compared with hidden states in fp32 on the wire: in fp16 they can depend on which node holds what.
    """
    from rich.console import Console

    from testbed.demo_assets import demo_model, export_demo_bundle
    from testbed.proof.chaos.run import run_chaos

    console = Console(highlight=False)
    wanted = [kind for kind in KINDS if not kinds or kind in kinds]
    if localhost:
        left_out = [kind for kind in wanted if kind in LINK_KINDS or (kind == "clock" and os.getuid() != 0)]
        wanted = [kind for kind in wanted if kind not in left_out]
        if left_out:
            click.echo(f"without emulated network and root these faults are left out: {', '.join(left_out)}", err=True)
    if not wanted:
        raise click.UsageError("--fault: no fault is left; run without --localhost as root")
    bundle = out / "bundle"
    export_demo_bundle(demo_model(layers=layers, console=console), bundle, "fp32", console=console)
    run_chaos(
        bundle, answers=answers, seed=seed, tokens=tokens, nodes=nodes, kinds=wanted, emulate=not localhost, out=out,
        console=console,
    )  # fmt: skip


@click.command(cls=Command, example="wdmoe-testbed soak --tokens 10000")
@click.option("--tokens", type=click.IntRange(100), default=20_000, show_default=True, help="Tokens to generate.")
@click.option(
    "--churn", "churn_s", type=click.FloatRange(5.0), default=30.0, show_default=True,
    help="Interval between kills of nodes, in seconds.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(3, 8), default=4, show_default=True, help="Node processes.")
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="Layers of the demo model.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seeds kills and sampling.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/soak"), show_default=True,
    help="Folder for results and logs.",
)  # fmt: skip
def soak(tokens: int, churn_s: float, nodes: int, layers: int, seed: int, out: Path) -> None:
    """Generate tokens while nodes are killed and restarted; check memory, open files and the log."""
    from rich.console import Console

    from testbed.demo_assets import demo_model, export_demo_bundle
    from testbed.proof.chaos.soak import run_soak

    if (out / "latency.csv").exists():
        raise click.UsageError(f"--out: {out} holds a log already; give another folder")
    console = Console(highlight=False)
    bundle = out / "bundle"
    export_demo_bundle(demo_model(layers=layers, console=console), bundle, "int4", console=console)
    run_soak(bundle, tokens=tokens, churn_s=churn_s, nodes=nodes, seed=seed, out=out, console=console)
