"""`wdmoe-testbed`: demo, quality of the quantisations, benchmarks."""

import logging
import os
from pathlib import Path

import click

from common.console import run as run_console
from testbed.bench.sections import SECTIONS
from testbed.evaluation.variants import VARIANTS
from testbed.experiment import commands
from testbed.fleet import commands as fleet_commands
from testbed.keys import commands as keys_commands
from testbed.network import commands as network_commands
from testbed.proof.arm import commands as arm_commands
from testbed.proof.chaos import commands as chaos_commands
from testbed.proof.machines import commands as machines_commands
from testbed.radio import commands as radio_commands
from wire import __version__


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """Run whole systems and measure them."""


@cli.command()
@click.option("--broker", default="embedded", show_default=True, help="embedded, mosquitto or an URL.")
@click.option("--nodes", type=click.IntRange(1, 8), default=8, show_default=True, help="Node processes.")
@click.option("--max-tokens", type=click.IntRange(1), default=80, show_default=True, help="Per answer.")
@click.option("--question", "questions", multiple=True, help="Instead of the three of the demo; repeatable.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
def demo(broker: str, nodes: int, max_tokens: int, questions: tuple[str, ...], runs: Path) -> None:
    """Build the demo model, start nodes as processes, answer three questions over MQTT."""
    from rich.console import Console

    from testbed.demo import QUESTIONS, run_demo

    run_demo(
        broker=broker,
        questions=questions or QUESTIONS,
        max_tokens=max_tokens,
        nodes=nodes,
        runs=runs,
        console=Console(),
    )


@cli.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="See docs/measurement.md.")
@click.option("--items", type=click.IntRange(1), default=300, show_default=True, help="Per task.")
@click.option("--texts", type=click.IntRange(1), default=3, show_default=True, help="Per domain.")
@click.option("--tokens", type=click.IntRange(2), default=384, show_default=True, help="Per text.")
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(VARIANTS)), help="Repeatable.")
@click.option(
    "--lost",
    type=click.IntRange(0, 7),
    multiple=True,
    help="Do without this expert of every layer, as after the loss of its only node; repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/quality.json"), show_default=True)
def quality(
    data: Path, items: int, texts: int, tokens: int, variants: tuple[str, ...], lost: tuple[int, ...], out: Path
) -> None:
    """Perplexity and accuracy of the demo model in every quantisation."""
    from rich.console import Console

    from testbed.demo_assets import demo_bundle
    from testbed.evaluation.quality import measure_quality, print_quality, write_quality

    console = Console()
    rows = []
    for name in variants or tuple(VARIANTS):
        scheme, block = VARIANTS[name]
        bundle = demo_bundle(scheme, block=block, console=console)
        with console.status(f"evaluating {name}"):
            rows.append(
                measure_quality(
                    bundle, data, items=items, texts_per_domain=texts, tokens=tokens,
                    threads=os.cpu_count() or 1, lost=lost,
                )
            )  # fmt: skip
        write_quality(rows, out, {"items": items, "texts_per_domain": texts, "tokens": tokens})
        print_quality(rows[-1:], console)
    print_quality(rows, console)


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.IntRange(64), default=2048, show_default=True, help="Of the text.")
@click.option("--chunk", type=click.IntRange(2), default=256, show_default=True, help="Tokens per context.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("differences.json"), show_default=True)
def differences(bundle: Path, text: Path, tokens: int, chunk: int, out: Path) -> None:
    """Measure on TEXT how much the experts of BUNDLE differ, for the policy 'similar'."""
    from bs_coordinator.selection.differences import write_differences
    from testbed.evaluation.differences import measure_differences

    document = measure_differences(
        bundle, text, tokens=tokens, chunk=chunk, threads=os.cpu_count() or 1,
        progress=lambda done: click.echo(f"{done} of {tokens} tokens", err=True),
    )  # fmt: skip
    write_differences(document, out)
    click.echo(f"table of expert differences in {out}: --policy similar:table={out}")


@cli.command("link-accuracy")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", multiple=True, help="Repeatable; else all.")
@click.option("--seconds", type=click.FloatRange(5), default=25.0, show_default=True, help="Of messages, each profile.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/link-accuracy.json"), show_default=True)
def link_accuracy(spec: Path, profiles: tuple[str, ...], seconds: float, out: Path) -> None:
    """Compare estimates of emulated links with what they are, with iperf3 and with the next messages."""
    from rich.console import Console

    from testbed.demo_assets import demo_bundle
    from testbed.proof.link_accuracy import measure_accuracy

    console = Console()
    measure_accuracy(spec, demo_bundle("int4", console=console), profiles, seconds=seconds, out=out, console=console)


@cli.command()
@click.option("--broker", default="mosquitto", show_default=True, help="embedded, mosquitto or an URL.")
@click.option("--section", "sections", multiple=True, type=click.Choice(list(SECTIONS)), help="Repeatable; else all.")
@click.option("--samples", type=click.IntRange(10), default=300, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench.json"), show_default=True)
def bench(broker: str, sections: tuple[str, ...], samples: int, out: Path) -> None:
    """Everything that should be fast, as ratios to what the hardware allows."""
    from rich.console import Console

    from testbed.bench.rows import Settings
    from testbed.bench.run import run_bench

    settings = Settings(broker=broker, samples=samples, folder=out.with_suffix(""), console=Console())
    run_bench(settings, sections, out)


commands.register(cli)
arm_commands.register(cli)
chaos_commands.register(cli)
fleet_commands.register(cli)
keys_commands.register(cli)
machines_commands.register(cli)
network_commands.register(cli)
radio_commands.register(cli)


def main() -> None:
    """Console entry."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its caches, at the first plot
    run_console(cli, "wdmoe-testbed")
