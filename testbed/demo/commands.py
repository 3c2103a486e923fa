"""`wdmoe-testbed demo` and `up`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from bs_coordinator.config import BaseStationConfig, PresetName, ServeConfig
from common.options import Command, config_options
from exporter.demo_model.assembly import DEFAULT_MODEL, DEMO_MODELS


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(demo)
    group.add_command(up)


class _DemoModel(click.Choice[str]):
    """One of the demo models."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What is wrong, and how other models are served."""
        message = super().get_invalid_choice_message(value, ctx).rstrip(".")
        return f"{message}; 'wdmoe-testbed up --bundle FOLDER' serves a model from 'wdmoe-export bundle'."


_MODEL = click.option(
    "--model", type=_DemoModel(list(DEMO_MODELS)), default=DEFAULT_MODEL, show_default=True,
    help="Which of the demo models.",
)  # fmt: skip
_BROKER = click.option(
    "--broker", default="embedded", show_default=True, help="MQTT broker: embedded, mosquitto, or an mqtt:// URL."
)


@click.command(cls=Command, example="wdmoe-testbed demo --nodes 4 --question 'Why is the sky blue?'")
@_MODEL
@_BROKER
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


@click.command(
    cls=Command,
    example="""\
wdmoe-testbed up
wdmoe-testbed up --bundle bundle --nodes 4 --port 8000""",
)
@_MODEL
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle to serve.  [default: the demo model's]")
@_BROKER
@click.option("--nodes", type=click.IntRange(1, 256), default=8, show_default=True, help="Number of node processes.")
@click.option("--policy", help="Policy that chooses experts (docs/policies.md).  [default: topk, or the preset's]")
@click.option("--preset", type=click.Choice(get_args(PresetName)), help="As of 'wdmoe-bs serve'.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
    help="Folder for the nodes' logs.",
)  # fmt: skip
@config_options(http=ServeConfig)
def up(
    model: str, bundle: Path | None, broker: str, nodes: int, policy: str | None, preset: PresetName | None,
    runs: Path, http: ServeConfig,
) -> None:  # fmt: skip
    """Keep broker, nodes and HTTP server running on this machine until Ctrl-C.

    Builds the demo model and its bundle first where they are missing.
    """
    from testbed.demo.up import run_fleet
    from testbed.demo_assets import demo_bundle_path

    config = BaseStationConfig(bundle=bundle or demo_bundle_path("int4", model=model), broker=broker, preset=preset)
    if policy is not None:
        config = replace(config, policy=policy, given=frozenset({"policy"}))
    run_fleet(config, http, demo=None if bundle else model, nodes=nodes, runs=runs)
