"""`wdmoe-testbed net`: emulated networks. Modules that are slow to import are imported inside the commands."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.json_output import json_option, print_json
from common.options import Group
from testbed.errors import NetworkError

if TYPE_CHECKING:
    from testbed.network.control import NetworkStatus

_NAME = click.option("--name", help="Name of the network; needed if several are up.")


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(net)


@click.group(cls=Group, example="wdmoe-testbed net up network.yaml")
def net() -> None:
    """Emulated Wi-Fi: base station and nodes as network namespaces (Linux, as root)."""


@net.command(example="wdmoe-testbed net up network.yaml --profile good")
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--profile", help="Profile to start with, instead of the first one.")
def up(spec: Path, profile: str | None) -> None:
    """Bring up the network that SPEC describes; it stays up until 'net down'."""
    from testbed.network.emulated import down as take_down
    from testbed.network.emulated import up as bring_up

    network = bring_up(spec)
    if profile is not None:
        try:
            network.set_profile(profile)
        except NetworkError:
            take_down(network.spec.name)
            raise
    click.echo(
        f"network '{network.spec.name}' is up: base station {network.bs_address}, {len(network.nodes)} nodes, profile "
        f"{network.status().profile}; a shell on a node: {' '.join(network.prefix(network.nodes[0]))} bash"
    )


@net.command(example="wdmoe-testbed net down")
@_NAME
@click.option("--all", "every", is_flag=True, help="Every network of this machine, those of others too.")
def down(name: str | None, every: bool) -> None:
    """Take a network down and remove all its namespaces and files, also after a crash."""
    from testbed.network.emulated import down as take_down
    from testbed.network.emulated import leftovers
    from testbed.network.namespaces import check_privileges

    if every and name is not None:
        raise click.UsageError("--name and --all exclude each other")
    check_privileges()
    found = leftovers()
    if name is not None and name not in found:
        raise NetworkError(f"there is no network '{name}'")
    if len(found) > 1 and name is None and not every:
        raise NetworkError(f"several networks are up, choose one with --name, or --all: {', '.join(found)}")
    for network in [name] if name is not None else found:
        take_down(network)
        click.echo(f"network '{network}' is down")
    if not found:
        click.echo("no network is up")


@net.command(example="wdmoe-testbed net status")
@_NAME
@json_option
def status(name: str | None, as_json: bool) -> None:
    """Show the current links, their traffic, and the relay's load."""
    from testbed.network.emulated import attach_by_name

    answer = attach_by_name(name).status()
    if as_json:
        print_json(answer)
    else:
        _print(answer)


@net.command("set", example="wdmoe-testbed net set bad")
@_NAME
@click.argument("profile")
def set_(name: str | None, profile: str) -> None:
    """Switch to PROFILE, from its beginning."""
    from testbed.network.emulated import attach_by_name

    attach_by_name(name).set_profile(profile)
    click.echo(f"profile {profile}")


@net.command(example="wdmoe-testbed net check --all-profiles")
@_NAME
@click.option("--profile", "profiles", multiple=True, help="Profile to check; repeatable.  [default: the active one]")
@click.option("--all-profiles", is_flag=True, help="Check every profile of the network.")
@click.option("--node", "nodes", multiple=True, help="Node to check; repeatable.  [default: all]")
@click.option(
    "--at", "at_s", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Moment of the profile to hold it at, in seconds.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(1, 60), default=2.0, show_default=True, help="Duration of each rate measurement."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the results as JSON.")
def check(
    name: str | None,
    profiles: tuple[str, ...],
    all_profiles: bool,
    nodes: tuple[str, ...],
    at_s: float,
    seconds: float,
    out: Path | None,
) -> None:
    """Compare the configured links with iperf3 and ping; the profile is held meanwhile."""
    from testbed.network.check import check_network
    from testbed.network.emulated import attach_by_name

    network = attach_by_name(name)
    chosen = tuple(network.spec.profiles) if all_profiles else profiles
    check_network(network, profiles=chosen, nodes=nodes or network.nodes, at_s=at_s, seconds=seconds, out=out)


def _print(status: "NetworkStatus") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    air = "one shared channel" if status.shared_air else "dedicated links"
    held = ", held" if status.held else ""
    table = Table(title=f"{status.name}: {status.profile} at {status.at_s:.1f} s{held}, {air}", box=box.SIMPLE)
    table.add_column("node")
    table.add_column("address")
    for column in ("Mbit/s", "ms ±", "loss %", "MB", "drop+lost", "queue ms"):
        table.add_column(column, justify="right")
    for node in status.nodes:
        link, both = node.link, (node.down, node.up)
        table.add_row(
            node.node,
            node.address,
            f"{link.down_mbps:.4g}/{link.up_mbps:.4g}",
            f"{link.delay_ms:.3g} {link.jitter_ms:.2g}",
            f"{link.loss_percent:.3g}",
            "/".join(f"{way.sent_bytes / 1e6:.1f}" for way in both),
            "/".join(f"{way.dropped_frames}+{way.lost_frames}" for way in both),
            "/".join(f"{way.waiting_ms:.0f}" for way in both),
        )
    table.caption = "a/b: down/up"
    console = Console()
    console.print(table)
    console.print(
        f"relay: process {status.pid}, {status.cpu_percent:.0f} % of a core, at most "
        f"{status.late_ms:.2f} ms late in the last second"
    )
