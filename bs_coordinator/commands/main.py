"""`wdmoe-bs`: the group of commands."""

import click

from bs_coordinator.commands.broker import broker
from bs_coordinator.commands.chat import chat
from bs_coordinator.commands.generate import generate
from bs_coordinator.commands.links import links
from bs_coordinator.commands.nodes import nodes
from bs_coordinator.commands.place.command import place
from bs_coordinator.commands.replay import replay
from bs_coordinator.commands.serve import serve
from bs_coordinator.commands.shape import shape
from common.console import run as run_console
from common.options import Group
from wire import __version__


@click.group(cls=Group, example="wdmoe-bs chat --bundle bundle --broker mqtt://127.0.0.1")
@click.version_option(__version__)
def cli() -> None:
    """The base station: runs the trunk of a mixture of experts and asks edge nodes for its experts."""


for command in (generate, chat, serve, nodes, links, replay, place, shape, broker):
    cli.add_command(command)


def main() -> None:
    """Console entry."""
    run_console(cli, "wdmoe-bs", extra="bs")
