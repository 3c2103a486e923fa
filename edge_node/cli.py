"""`wdmoe-node`: serve experts of a bundle. `serve` is the command when none is named."""

import signal
import threading
from typing import Any

import click
from click.shell_completion import CompletionItem

from common.console import run as run_console
from common.options import Command, Group, config_options
from edge_node.config import NodeConfig
from edge_node.tune_command import tune
from wire import __version__

_OF_THE_GROUP = ("-h", "--help", "--version")


class _ServeByDefault(Group):
    """A group whose first argument may be an option of `serve`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A shell that asks for completions sends the words before the last: none does not mean `serve`.
        unnamed = not ctx.resilient_parsing if not args else args[0][:1] == "-" and args[0] not in _OF_THE_GROUP
        return super().parse_args(ctx, ["serve", *args] if unnamed else args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and options of the group and of `serve`."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            with click.Context(serve, parent=ctx, info_name="serve") as inner:
                found += [item for item in serve.shell_complete(inner, incomplete) if item.value != "--help"]
        return found


@click.group(
    cls=_ServeByDefault, example="wdmoe-node --bundle bundle --broker mqtt://127.0.0.1 --id pi1 --experts 'L*:E0-3'"
)
@click.version_option(__version__)
def cli() -> None:
    """An edge node: computes experts and answers over MQTT. Without COMMAND: serve."""


@click.command(
    cls=Command,
    example="""\
wdmoe-node --bundle bundle --broker mqtt://127.0.0.1 --id pi1 --experts 'L*:E0-3'
wdmoe-node --bundle bundle --broker mqtts://pi1@bs.local --ca-file ca.crt \\
    --password-file password --id pi1 --experts 'L*:E*' --residency lru""",
)
@config_options(config=NodeConfig)
def serve(config: NodeConfig) -> None:
    """Serve experts of a bundle to the base station over MQTT."""
    from edge_node.node import build_node, choose_variant

    config = choose_variant(config)
    stop = _stop_on_signals()
    build_node(config).run(stop)


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set: from now on they end the node, not the process."""
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        # `set` takes a lock that the interrupted `wait`, or the handler of a signal just before, may hold.
        # Signals do come in bursts: a dying parent's threads each send one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=stop.set, daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


cli.add_command(serve)
cli.add_command(tune)


def main() -> None:
    """Console entry."""
    run_console(cli, "wdmoe-node", extra="edge")
