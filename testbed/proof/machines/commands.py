"""`wdmoe-testbed machines`."""

from pathlib import Path

import click

from common.options import Group
from testbed.errors import NetworkError

_FOLDER = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("runs/machines"),
    show_default=True,
    help="Folder of all files.",
)


def register(group: click.Group) -> None:
    """Add the commands to `wdmoe-testbed`."""
    group.add_command(machines)


@click.group(cls=Group, example="wdmoe-testbed machines up network.yaml")
def machines() -> None:
    """Fresh Debian machines on an emulated network, to test deployment (Linux, as root)."""


@machines.command(example="wdmoe-testbed machines up network.yaml")
@click.argument("spec", type=click.Path(path_type=Path))
@_FOLDER
@click.option("--arm64", multiple=True, help="Run this node's programs as arm64 with qemu-user; repeatable.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle in the inventory.  [default: the demo's, int4]")
def up(spec: Path, folder: Path, arm64: tuple[str, ...], bundle: Path | None) -> None:
    """Bring up the network of SPEC, with a machine for the base station and for each node."""
    from rich.console import Console

    from testbed.demo_assets import demo_bundle
    from testbed.network import emulated
    from testbed.network.spec import read_spec
    from testbed.proof.machines.virtual_machines import VirtualMachines
    from wire.manifest import load_manifest

    name = read_spec(spec).name
    bundle = bundle.absolute() if bundle else demo_bundle("int4", console=Console(stderr=True))
    experts = load_manifest(bundle).dims.experts
    network = emulated.up(spec)
    virtual_machines = VirtualMachines(folder)
    try:
        with Console(stderr=True).status("machines (the first time, debootstrap takes minutes)"):
            virtual_machines.up(network, arm64=arm64, bundle=bundle, experts=experts)
    except BaseException:
        emulated.down(name)
        raise
    (folder / "network").write_text(name)
    click.echo(f"{len(network.nodes) + 1} machines are up on network '{name}'; inventory: {virtual_machines.inventory}")


@machines.command(example="wdmoe-testbed machines down")
@_FOLDER
def down(folder: Path) -> None:
    """Take machines and network down and delete all their files, also after a crash."""
    from testbed.network import emulated
    from testbed.network.namespaces import check_privileges
    from testbed.proof.machines.virtual_machines import VirtualMachines

    check_privileges()
    VirtualMachines(folder).down()
    note = folder / "network"
    try:
        name = note.read_text()
    except FileNotFoundError:
        click.echo("no machines are up")
        return
    emulated.down(name)
    note.unlink()
    click.echo(f"machines on network '{name}' are down")


@machines.command(example="wdmoe-testbed machines status")
@_FOLDER
def status(folder: Path) -> None:
    """Show which machines are running."""
    from testbed.proof.machines.virtual_machines import VirtualMachines

    found = VirtualMachines(folder).machines()
    if not found:
        raise NetworkError(f"no machines are up in {folder}: 'wdmoe-testbed machines up SPEC' starts some")
    for machine in found:
        process = machine.process()
        state = f"running, process {process.pid}" if process else f"ended: {machine.last_log_line()}"
        click.echo(f"{machine.name:12} {state}")
