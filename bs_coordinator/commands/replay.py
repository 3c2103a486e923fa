"""`wdmoe-bs replay`."""

from pathlib import Path

import click

from bs_coordinator.commands.tables import print_links
from common.json_output import json_option, print_json
from common.options import Command


@click.command(cls=Command, example="wdmoe-bs replay links.jsonl")
@click.argument("log_path", metavar="LOG", type=click.Path(path_type=Path))
@click.option("--shared-air", is_flag=True, help="The log was recorded with --shared-air.")
@json_option
def replay(log_path: Path, shared_air: bool, as_json: bool) -> None:
    """Estimate links from the samples of a --link-log.

    Also prints how well each next sample was predicted.
    """
    from bs_coordinator.links.log import read_link_log
    from bs_coordinator.links.replay import replay as replay_samples

    replayed = replay_samples(read_link_log(log_path), shared_air=shared_air)
    if as_json:
        print_json(replayed)
        return
    print_links([node.estimate for node in replayed])
    for node in replayed:
        click.echo(
            f"{node.estimate.node}: {node.samples} samples; link's part of each next request off by "
            f"{100 * node.error:.1f} % (median), {100 * node.error_p90:.1f} % (90th percentile)"
        )
