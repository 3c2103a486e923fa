"""`wdmoe-bs broker`."""

import threading

import click

from common.options import Command


@click.command(cls=Command, example="wdmoe-bs broker --kind mosquitto")
@click.option(
    "--kind", type=click.Choice(["embedded", "mosquitto"]), default="embedded", show_default=True,
    help="embedded is pure Python; mosquitto is faster and must be installed.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=1883, show_default=True, help="Port to listen on.")
def broker(kind: str, port: int) -> None:
    """Run a private broker on loopback until Ctrl-C.

    For trying things out on one machine: devices need a broker on the network.
    """
    from bs_coordinator.broker.processes import open_broker

    with open_broker(kind, port=port) as address:
        click.echo(f"{kind} broker at {address}; Ctrl-C ends it")
        threading.Event().wait()
