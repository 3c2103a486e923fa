"""`wdmoe-testbed keys`."""

from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import click

from common.json_output import json_option, print_json
from common.options import Group
from edge_node.home_assistant import DEFAULT_PREFIX
from testbed.keys.validity import AUTHORITY_DAYS, CERTIFICATE_DAYS, RENEWAL_DAYS

_FOLDER = click.argument("folder", type=click.Path(path_type=Path))
_DAYS = click.option(
    "--days", type=click.FloatRange(0, AUTHORITY_DAYS, min_open=True), default=CERTIFICATE_DAYS, show_default=True,
    help="Validity of certificates, in days.",
)  # fmt: skip


def register(cli: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    cli.add_command(keys)


@click.group(cls=Group, example="wdmoe-testbed keys init keys --host 192.168.1.10 --node pi1 --node pi2")
def keys() -> None:
    """Certificates, frame keys and the broker's access list of a cluster."""


@keys.command(example="wdmoe-testbed keys init keys --host 192.168.1.10 --node pi1 --node pi2")
@_FOLDER
@click.option("--host", "hosts", multiple=True, required=True, help="Name or address of the broker; repeatable.")
@click.option("--node", "nodes", multiple=True, help="Id of a node; repeatable. 'keys add' adds more later.")
@click.option("--cluster", default="default", show_default=True, help="Name of the cluster.")
@click.option("--port", type=click.IntRange(1, 65535), default=8883, show_default=True, help="Port of the broker.")
@click.option(
    "--broker-folder", default="/etc/mosquitto/wdmoe", show_default=True,
    help="Folder on the broker's machine to which broker/ will be copied.",
)  # fmt: skip
@_DAYS
def init(
    folder: Path, hosts: tuple[str, ...], nodes: tuple[str, ...], cluster: str, port: int, broker_folder: str,
    days: float,
) -> None:  # fmt: skip
    """Make all keys of a new cluster in FOLDER."""
    from testbed.keys.folder import create

    create(
        folder, cluster=cluster, hosts=hosts, nodes=nodes, days=days, port=port,
        broker_folder=PurePosixPath(broker_folder),
    )  # fmt: skip
    click.echo(
        f"{folder}: keys of the broker, the base station and {len(nodes)} nodes; keep ca.key and bundle.key here"
    )


@keys.command(example="wdmoe-testbed keys add keys pi3")
@_FOLDER
@click.argument("nodes", nargs=-1, required=True)
@_DAYS
def add(folder: Path, nodes: tuple[str, ...], days: float) -> None:
    """Make keys for more NODES."""
    from testbed.keys.folder import KeyFolder

    KeyFolder(folder).add(nodes, days=days)
    click.echo(_then(folder, *(f"nodes/{name}" for name in nodes)))


@keys.command(example="wdmoe-testbed keys revoke keys pi2")
@_FOLDER
@click.argument("nodes", nargs=-1, required=True)
def revoke(folder: Path, nodes: tuple[str, ...]) -> None:
    """Revoke the certificates of NODES and delete their keys."""
    from testbed.keys.folder import KeyFolder

    KeyFolder(folder).revoke(nodes)
    click.echo(_then(folder))


@keys.command(example="wdmoe-testbed keys rotate keys frames")
@_FOLDER
@click.argument("names", nargs=-1, required=True)
@click.option("--revoke-old", is_flag=True, help="Revoke the old certificates, which otherwise stay valid.")
@_DAYS
def rotate(folder: Path, names: tuple[str, ...], revoke_old: bool, days: float) -> None:
    """Renew the keys of NAMES: nodes, 'bs', 'broker', 'home-assistant', or 'frames' for all frame keys."""
    from testbed.keys.folder import FRAMES, KeyFolder
    from testbed.keys.mosquitto import BASE_STATION, HOME_ASSISTANT

    opened = KeyFolder(folder)
    opened.rotate(names, days=days, revoke_old=revoke_old)
    nodes = opened.nodes if FRAMES in names else [name for name in names if name in opened.nodes]
    others = [BASE_STATION] if {FRAMES, BASE_STATION} & set(names) else []
    others += [HOME_ASSISTANT] if HOME_ASSISTANT in names else []
    click.echo(_then(folder, *others, *(f"nodes/{name}" for name in nodes)))


@keys.command(name="home-assistant", example="wdmoe-testbed keys home-assistant keys")
@_FOLDER
@click.option(
    "--prefix", default=DEFAULT_PREFIX, show_default=True, help="Prefix of Home Assistant's discovery topics."
)
@_DAYS
def home_assistant(folder: Path, prefix: str, days: float) -> None:
    """Make keys for a Home Assistant, and let nodes announce themselves to it."""
    from testbed.keys.folder import KeyFolder
    from testbed.keys.mosquitto import HOME_ASSISTANT

    KeyFolder(folder).admit_home_assistant(prefix, days=days)
    click.echo(_then(folder, HOME_ASSISTANT))


@keys.command(name="list", example="wdmoe-testbed keys list keys")
@_FOLDER
@json_option
def list_(folder: Path, as_json: bool) -> None:
    """Print when each certificate expires."""
    from testbed.keys.folder import KeyFolder

    now, expiries = datetime.now(UTC), KeyFolder(folder).expiries()
    if as_json:
        print_json([expiry._asdict() for expiry in expiries])
        return
    for name, until in expiries:
        left = (until - now).days
        note = "  EXPIRED" if until <= now else f"  in {left} days" + ("  renew soon" if left < RENEWAL_DAYS else "")
        click.echo(f"{name:20} {until:%Y-%m-%d %H:%M} UTC{note}")


def _then(folder: Path, *parts: str) -> str:
    own = "".join(f", {folder / part} to its machine" for part in parts)
    return f"copy {folder / 'broker'} to the broker and reload it (systemctl reload mosquitto){own}"
