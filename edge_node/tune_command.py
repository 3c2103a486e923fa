"""`wdmoe-node tune`."""

import click

from common.options import Command, config_options
from edge_node.config import TuneConfig


@click.command(cls=Command, example="wdmoe-node tune --bundle int4 --bundle int8 --experts 'L*:E3' --tuned tuned.json")
@config_options(config=TuneConfig)
def tune(config: TuneConfig) -> None:
    """Measure which bundle and how many threads suit this device.

    The choice and its reason are written to a file that 'wdmoe-node serve --tuned FILE' reads.
    """
    from edge_node.node import variants_of
    from edge_node.tuning.tuning_file import table

    tuning = variants_of(config, config.threads).tune(config.tuned, config.rule)
    click.echo(table(tuning))
    click.echo(f"\n{tuning.why}\nkept in {config.tuned}")
