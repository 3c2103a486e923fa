"""`wdmoe-testbed demo`."""

from pathlib import Path

import click

from common.options import Command
from exporter.demo_model.assembly import DEFAULT_MODEL, DEMO_MODELS


def register(group: click.Group) -> None:
    """Add the command to `wdmoe-testbed`."""
    group.add_command(demo)


@click.command(cls=Command)
@click.option(
    "--model", type=click.Choice(list(DEMO_MODELS)), default=DEFAULT_MODEL, show_default=True,
    help="Which of the demo models.",
)  # fmt: skip
@click.option(
    "--broker", default="embedded", show_default=True, help="MQTT broker: embedded, mosquitto, or an mqtt:// URL."
)
@click.option("--nodes", type=click.IntRange(1, 8), default=8, show_default=True, help="Number of node processes.")
@click.option("--max-tokens", type=click.IntRange(1), default=80, show_default=True, help="Length limit per answer.")
@click.option("--question", "questions", multiple=True, help="Ask this instead of the three questions; repeatable.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
    help="Folder for the latency log and the nodes' logs.",
)  # fmt: skip
def demo(model: str, broker: str, nodes: int, max_tokens: int, questions: tuple[str, ...], runs: Path) -> None:
    """Answer three questions with a demo model on node processes.

    Builds the model and its bundle first where they are missing.
    """
    from rich.console import Console

    from testbed.demo.run import QUESTIONS, run_demo

    run_demo(
        model=model, broker=broker, questions=questions or QUESTIONS, max_tokens=max_tokens, nodes=nodes, runs=runs,
        console=Console(),
    )  # fmt: skip
