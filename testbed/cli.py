"""`wdmoe-testbed`: the group of commands. Each command lives with its package."""

import importlib
import importlib.util
import logging

import click

from common.console import run as run_console
from common.options import Group
from testbed.archive import commands as archive_commands
from testbed.bench import commands as bench_commands
from testbed.demo import commands as demo_commands
from testbed.evaluation import commands as evaluation_commands
from testbed.experiment import commands as experiment_commands
from testbed.fleet import commands as fleet_commands
from testbed.keys import commands as keys_commands
from testbed.network import commands as network_commands
from testbed.preflight import commands as preflight_commands
from testbed.radio import commands as radio_commands
from testbed.report import commands as report_commands
from testbed.run_directory import commands as run_directory_commands
from testbed.twin import commands as twin_commands
from testbed.versus import commands as versus_commands
from testbed.whole_shape import commands as whole_shape_commands
from wire import __version__


@click.group(
    cls=Group, example="wdmoe-testbed up",
    elsewhere={"serve": "'wdmoe-testbed up', or 'wdmoe-bs serve' with nodes that run already"},
)  # fmt: skip
@click.version_option(__version__)
def cli() -> None:
    """Run whole systems and measure them."""


demo_commands.register(cli)
preflight_commands.register(cli)
experiment_commands.register(cli)
run_directory_commands.register(cli)
report_commands.register(cli)
archive_commands.register(cli)
evaluation_commands.register(cli)
bench_commands.register(cli)
versus_commands.register(cli)
twin_commands.register(cli)
whole_shape_commands.register(cli)
network_commands.register(cli)
radio_commands.register(cli)
fleet_commands.register(cli)
keys_commands.register(cli)
# Not in the wheel.
if importlib.util.find_spec("testbed.proof"):
    importlib.import_module("testbed.proof.commands").register(cli)


def main() -> None:
    """Console entry."""
    # Otherwise it reports its font cache at the first plot, and a home that it can't write, which does not matter.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    run_console(cli, "wdmoe-testbed", extra="testbed")
