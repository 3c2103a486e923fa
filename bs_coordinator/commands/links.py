"""`wdmoe-bs links`."""

import time
from contextlib import ExitStack
from pathlib import Path

import click

from bs_coordinator.commands.station import connect_nodes
from bs_coordinator.commands.tables import print_links
from bs_coordinator.config import ClusterConfig
from bs_coordinator.errors import PlacementError
from common.json_output import json_option, print_json
from common.options import Command, config_options


@click.command(cls=Command, example="wdmoe-bs links --bundle bundle --broker mqtt://127.0.0.1 --seconds 10")
@click.option(
    "--seconds", type=click.FloatRange(0.5, 3600), default=5.0, show_default=True, help="How long to probe the links."
)
@click.option(
    "--link-log",
    type=click.Path(path_type=Path),
    help="Append every link sample to this file; 'wdmoe-bs replay' reads it.",
)
@json_option
@config_options(config=ClusterConfig)
def links(seconds: float, link_log: Path | None, as_json: bool, config: ClusterConfig) -> None:
    """Measure the idle links of all nodes."""
    from bs_coordinator.links.log import link_log as open_log

    with ExitStack() as stack:
        log = stack.enter_context(open_log(link_log)) if link_log else None
        dispatcher = stack.enter_context(connect_nodes(config, log))
        if not dispatcher.registry.nodes:
            raise PlacementError("no node is online")
        dispatcher.measure_links(seconds)
        estimates = dispatcher.links.estimates(time.perf_counter())
        if as_json:
            print_json(estimates)
        else:
            print_links(estimates)
