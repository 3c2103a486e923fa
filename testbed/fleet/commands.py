"""`wdmoe-testbed fleet`: deployment to the devices of an inventory with Ansible."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from common.json_output import json_option, print_json
from common.options import Group
from testbed.errors import FleetError

if TYPE_CHECKING:
    from testbed.fleet.ansible import HostRecap

_PATH = click.Path(path_type=Path)
_INVENTORY = click.option(
    "-i", "--inventory", type=_PATH, default=Path("fleet.yaml"), show_default=True, help="Inventory file."
)
_LIMIT = click.option("--limit", help="Only these hosts, an Ansible pattern: pi1,pi2 or 'pi*'.")
_TIMEOUT = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(10),
    default=7200.0,
    show_default=True,
    help="Time limit in seconds.",
)
_QUICK_S = 600.0


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(fleet)


@click.group(cls=Group, example="wdmoe-testbed fleet up -i fleet.yaml")
def fleet() -> None:
    """Deploy to the devices of an inventory, over ssh."""


@fleet.command(example="wdmoe-testbed fleet init fleet.yaml")
@click.argument("path", type=_PATH, default=Path("fleet.yaml"))
def init(path: Path) -> None:
    """Write an example inventory to PATH."""
    if path.exists():
        raise FleetError(f"{path} exists already: edit it, or give another path")
    path.write_bytes((Path(__file__).parent / "example.yaml").read_bytes())
    click.echo(f"wrote {path}: enter your devices, then run 'wdmoe-testbed fleet up -i {path}'")


@fleet.command(example="wdmoe-testbed fleet up -i fleet.yaml --check")
@_INVENTORY
@_LIMIT
@_TIMEOUT
@click.option("--check", is_flag=True, help="Report what would change, and change nothing.")
def up(inventory: Path, limit: str | None, timeout_s: float, check: bool) -> None:
    """Bring base station and nodes to the state of the inventory; change only what differs."""
    _deploy(inventory, limit, timeout_s, {}, check=check)


@fleet.command(example="wdmoe-testbed fleet update -i fleet.yaml")
@_INVENTORY
@_LIMIT
@_TIMEOUT
def update(inventory: Path, limit: str | None, timeout_s: float) -> None:
    """Deploy this clone's code, one node after the other; a node that does not start returns to its old release."""
    _deploy(inventory, limit, timeout_s, {"wdmoe_serial": 1}, check=False)


@fleet.command(example="wdmoe-testbed fleet rollback -i fleet.yaml")
@_INVENTORY
@_LIMIT
@_TIMEOUT
@click.argument("release", required=False)
def rollback(inventory: Path, limit: str | None, timeout_s: float, release: str | None) -> None:
    """Return to RELEASE, or to the base station's previous one; a second rollback undoes the first."""
    variables = {} if release is None else {"wdmoe_target": release}
    _run("rollback", inventory, variables, limit=limit, timeout_s=timeout_s)


@fleet.command(example="wdmoe-testbed fleet status -i fleet.yaml")
@_INVENTORY
@json_option
def status(inventory: Path, as_json: bool) -> None:
    """Show release, service state and resources of each host."""
    hosts = _ask_hosts("status", inventory, {}, timeout_s=_QUICK_S)
    if as_json:
        print_json(hosts)
    else:
        _print_status(hosts)


@fleet.command(example="wdmoe-testbed fleet logs -i fleet.yaml --limit pi1")
@_INVENTORY
@_LIMIT
@click.option("--since", default="-1d", show_default=True, help="In journalctl's format: -2h, 2026-11-20, today.")
@click.option("--out", type=_PATH, help="Folder for the files.  [default: runs/fleet-logs-TIME]")
def logs(inventory: Path, limit: str | None, since: str, out: Path | None) -> None:
    """Fetch journals, release histories and the base station's runs into a folder."""
    out = (out or Path("runs") / time.strftime("fleet-logs-%Y%m%d-%H%M%S")).absolute()
    for host in _hosts(inventory):
        (out / host).mkdir(parents=True, exist_ok=True)
    _run("logs", inventory, {"wdmoe_since": since, "wdmoe_out": str(out)}, limit=limit, quiet=True)
    click.echo(f"logs in {out}")


@fleet.command(example="wdmoe-testbed fleet ask -i fleet.yaml 'What is the capital of France?'")
@_INVENTORY
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Length limit.")
def ask(inventory: Path, prompt: str, max_tokens: int) -> None:
    """Generate an answer to PROMPT on the base station and its nodes."""
    variables = {"wdmoe_prompt": prompt, "wdmoe_max_tokens": max_tokens}
    answer = _ask_hosts("ask", inventory, variables, timeout_s=_QUICK_S)
    click.echo(answer["text"])
    click.echo(answer["said"], err=True)


@fleet.command(example="wdmoe-testbed fleet down -i fleet.yaml")
@_INVENTORY
@_LIMIT
def down(inventory: Path, limit: str | None) -> None:
    """Stop all services and keep them off after a reboot; `up` starts them again."""
    _run("down", inventory, {}, limit=limit)


@fleet.command(example="wdmoe-testbed fleet uninstall -i fleet.yaml --limit pi3")
@_INVENTORY
@_LIMIT
@click.option("--purge", is_flag=True, help="Also remove measurements: /var/lib/wdmoe.")
@click.confirmation_option(prompt="Remove WDMoE from the devices?")
def uninstall(inventory: Path, limit: str | None, purge: bool) -> None:
    """Remove everything that deployment put on the devices; keep runs unless --purge."""
    _run("uninstall", inventory, {"wdmoe_purge": purge}, limit=limit)


@fleet.command(example="wdmoe-testbed fleet wheels --machine aarch64 --python 3.11")
@click.option("--machine", type=click.Choice(["aarch64", "x86_64"]), required=True, help="As printed by `uname -m`.")
@click.option("--python", required=True, help="Major and minor version, such as 3.11.")
@click.option("--glibc", default="2.36", show_default=True, help="Version of the device's C library.")
@click.option(
    "--extra", type=click.Choice(["edge", "bs", "testbed"]), default="edge", show_default=True, help="Package extra."
)
@click.option("--cache", type=_PATH, help="Folder of the wheels.  [default: in the user's cache folder]")
@click.option("--check", is_flag=True, help="Report what would be fetched, and fetch nothing.")
def wheels(machine: str, python: str, glibc: str, extra: str, cache: Path | None, check: bool) -> None:
    """Fetch the wheels that a kind of device needs; print their folder as JSON."""
    from contextlib import nullcontext

    from common.user_folders import user_folder
    from testbed.fleet.wheelhouse import Target, source_root, wheelhouse

    try:
        target = msgspec.convert({"machine": machine, "python": python, "glibc": glibc, "extra": extra}, Target)
    except msgspec.ValidationError as error:
        raise click.UsageError(str(error)) from None
    with nullcontext(cache) if cache is not None else user_folder("cache") as folder:
        wheels_folder = folder.absolute() if cache is not None else folder / "wheels"
        click.echo(msgspec.json.encode(wheelhouse(target, wheels_folder, source_root(), check=check)))


@fleet.command(example="wdmoe-testbed fleet files bundle --experts 'L*:E3'")
@click.argument("bundle", type=_PATH)
@click.option("--experts", help="Experts of a node, such as 'L*:E0-1'.")
@click.option("--trunk", is_flag=True, help="Files of the base station.")
def files(bundle: Path, experts: str | None, trunk: bool) -> None:
    """Print the files of BUNDLE that a device needs, with sizes and hashes, as JSON."""
    from testbed.fleet.files import needed_files

    if experts is None and not trunk:
        raise click.UsageError("give --experts for a node, or --trunk for the base station")
    try:
        needed = needed_files(bundle, experts=experts, trunk=trunk)
    except ValueError as error:
        raise click.UsageError(f"--experts: {error}") from None
    click.echo(msgspec.json.encode(needed))


def _deploy(inventory: Path, limit: str | None, timeout_s: float, variables: Mapping[str, Any], *, check: bool) -> None:
    from testbed.fleet.ansible import read_inventory
    from testbed.fleet.prepare import prepare_bundles, prepare_keys

    read = read_inventory(inventory)
    prepare_bundles(read, check=True)  # before any key is made: a bundle may be missing or wrong
    for line in (*prepare_keys(read, check=check), *prepare_bundles(read, check=check)):
        click.echo(line)
    _run("site", inventory, variables, limit=limit, timeout_s=timeout_s, check=check)


def _run(
    name: str, inventory: Path, variables: Mapping[str, Any], *, limit: str | None = None, timeout_s: float = _QUICK_S,
    check: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    from testbed.fleet.ansible import read_inventory, run_playbook

    read_inventory(inventory)
    began = time.monotonic()
    hosts = run_playbook(
        name, inventory, variables=variables, limit=limit, check=check, quiet=quiet, timeout_s=timeout_s
    )
    if not quiet:
        _print_recap(hosts, time.monotonic() - began)


def _ask_hosts(name: str, inventory: Path, variables: Mapping[str, Any], *, timeout_s: float) -> Any:
    from testbed.fleet.ansible import read_inventory, run_playbook

    read_inventory(inventory)
    with tempfile.TemporaryDirectory(prefix="wdmoe-fleet-") as folder:
        out = Path(folder) / "out.json"
        run_playbook(
            name, inventory, variables={**variables, "wdmoe_out": str(out)}, limit=None, check=False, quiet=True,
            timeout_s=timeout_s,
        )  # fmt: skip
        return msgspec.json.decode(out.read_bytes())


def _hosts(inventory: Path) -> list[str]:
    from testbed.fleet.ansible import read_inventory

    read = read_inventory(inventory)
    return [read.base_station, *read.nodes]


def _print_recap(hosts: "dict[str, HostRecap]", seconds: float) -> None:
    changed = sum(recap.changed for recap in hosts.values())
    for host, recap in sorted(hosts.items()):
        click.echo(f"{host:16} {recap.changed} changed, {recap.ok} ok")
    click.echo(f"{len(hosts)} hosts, {changed} changed, {seconds:.0f} s")


def _print_status(hosts: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for column in ("host", "release", "previous", "service"):
        table.add_column(column)
    for column in ("restarts", "RAM MiB", "disk free GiB", "clock offset ms"):
        table.add_column(column, justify="right")
    for host, now in hosts.items():
        if "service" not in now:
            table.add_row(host, "–", "–", str(now.get("msg", "unreachable")))
            continue
        table.add_row(
            host, now["release"] or "–", now["previous"] or "–", now["service"], str(now["restarts"]),
            _number(now["memory_bytes"], 2**20, 0), _number(now["disk_free_bytes"], 2**30, 1),
            _number(now["clock_offset_ms"], 1, 3),
        )  # fmt: skip
    Console().print(table)


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"
