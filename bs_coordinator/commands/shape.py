"""`wdmoe-bs shape`: the command; `bs_coordinator.airtime.shaping` talks to the kernel."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.clock import SYSTEM_CLOCK, Clock
from common.options import Command

if TYPE_CHECKING:
    from bs_coordinator.airtime import shaping


def _per_node(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Number by address, from `ADDRESS=NUMBER` each; the number must be above 0."""
    found = {}
    for value in values:
        address, _, number = value.rpartition("=")
        try:
            found[address] = float(number)
        except ValueError:
            found[address] = 0
        if not address or not 0 < found[address] < float("inf"):
            raise click.BadParameter(f"'{value}' is not ADDRESS=NUMBER with a number above 0")
    return found


def _addresses(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Address by node, from `NODE=ADDRESS` each."""
    found = dict(value.partition("=")[::2] for value in values)
    if not all(node and address for node, address in found.items()):
        raise click.BadParameter("write NODE=ADDRESS, such as pi1=192.168.1.21")
    return found


@click.command(
    cls=Command,
    example="""\
wdmoe-bs shape wlan0 --link 192.168.1.21=40 --link 192.168.1.22=9
wdmoe-bs shape wlan0 --follow links.jsonl --node pi1=192.168.1.21
wdmoe-bs shape wlan0 --off""",
)
@click.argument("interface")
@click.option(
    "--link",
    "links",
    multiple=True,
    callback=_per_node,
    metavar="ADDRESS=MBPS",
    help="A node's address and the rate of its link in Mbit/s; repeatable.",
)
@click.option(
    "--rows", multiple=True, callback=_per_node, metavar="ADDRESS=ROWS",
    help="Hidden states that a layer sends to a node; repeatable.  [default: all nodes alike]",
)  # fmt: skip
@click.option(
    "--follow",
    metavar="LOG",
    type=click.Path(path_type=Path),
    help="Take rates and rows from the --link-log of a running base station, until interrupted.",
)
@click.option(
    "--node",
    "nodes",
    multiple=True,
    callback=_addresses,
    metavar="NODE=ADDRESS",
    help="A node's address, for --follow; repeatable.",
)
@click.option(
    "--every",
    type=click.FloatRange(0.2, 3600),
    default=5.0,
    show_default=True,
    help="Seconds between changes, for --follow.",
)
@click.option("--off", is_flag=True, help="Remove all shares from the interface.")
def shape(
    interface: str, links: dict[str, float], rows: dict[str, float], follow: Path | None, nodes: dict[str, str],
    every: float, off: bool,
) -> None:  # fmt: skip
    """Share an interface's air time among the nodes (root).

    The shares are such that hidden states reach all nodes at the same time.
    """
    from bs_coordinator.airtime import shaping

    if off + bool(links) + (follow is not None) != 1 or bool(nodes) != (follow is not None):
        raise click.UsageError("give a --link for each node, or --follow and a --node for each node, or --off")
    if off:
        shaping.clear(interface)
        return
    if follow is not None:
        _follow(interface, follow, nodes, every)
        return
    if unknown := rows.keys() - links:
        raise click.UsageError(f"--rows names {', '.join(sorted(unknown))}, but no --link does")
    given = [shaping.ShapedLink(address, mbps, rows.get(address, 1.0)) for address, mbps in links.items()]
    shaping.shape(interface, given)
    _print_shares(given)


def _follow(
    interface: str, log: Path, addresses: dict[str, str], every_s: float, *, clock: Clock = SYSTEM_CLOCK
) -> None:
    from bs_coordinator.airtime import shaping
    from bs_coordinator.links import LinkMonitor
    from bs_coordinator.links.log import LinkLogReader

    reader, monitor = LinkLogReader(log), LinkMonitor()
    shaper = shaping.Shaper(interface, addresses)
    now_s = 0.0
    try:
        while True:
            rows: Counter[str] = Counter()
            for sample in reader.read():
                monitor.observe([sample])
                rows[sample.node] += sample.rows
                now_s = sample.time_s
            if shaper.update({e.node: e.link.down_mbps for e in monitor.estimates(now_s)}, rows):
                _print_shares(shaper.links)
            clock.sleep_s(every_s)
    finally:
        if shaper.links:
            shaping.clear(interface)


def _print_shares(links: "Sequence[shaping.ShapedLink]") -> None:
    from bs_coordinator.airtime import shaping

    for link, share in zip(links, shaping.time_shares(links), strict=True):
        click.echo(f"{link.address}: {share:.1%} of the time, {share * link.mbps:.2f} of {link.mbps:.3g} Mbit/s")
