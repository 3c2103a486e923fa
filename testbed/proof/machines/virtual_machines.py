"""Machines for the base station and the nodes of an emulated network, and their inventory.

FOLDER/
  fleet.yaml       inventory for `wdmoe-testbed fleet`
  ssh              ssh from the base station's network namespace
  id_ed25519       key for logging in to all machines
  known_hosts
  machines/NAME/   overlay and console of each machine
"""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

from common.child_output import run_parsed
from testbed.errors import MachineError
from testbed.network import namespaces
from testbed.network.daemon import BASE_STATION
from testbed.network.emulated import EmulatedNetwork
from testbed.proof.machines.machine import Machine
from testbed.proof.machines.rootfs import USER, ensure_emulation, rootfs

INVENTORY = "fleet.yaml"
_BOOT_S = 120.0
_EMULATED_BOOT_S = 600.0
_TOOLS = ("systemd-nspawn", "ssh", "ssh-keygen", "mount", "setsid", "rsync")


class VirtualMachines:
    """The machines of one network.

    Args:
        folder: folder of all their files; made if missing.

    Attributes:
        inventory: path of the inventory.
        ssh: path of the ssh wrapper.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.inventory = self.folder / INVENTORY
        self.ssh = self.folder / "ssh"

    def machines(self) -> list[Machine]:
        """All machines in the folder, running or crashed."""
        parent = self.folder / "machines"
        return [Machine(path, path.name) for path in sorted(parent.iterdir())] if parent.is_dir() else []

    def up(self, network: EmulatedNetwork, *, arm64: Collection[str], bundle: Path, experts: int) -> None:
        """Start a machine for the base station and for each node, and write the inventory.

        Args:
            network: network that is up.
            arm64: nodes whose programs run as arm64 with qemu-user.
            bundle: bundle in the inventory.
            experts: experts per layer; nodes share them evenly.

        Raises:
            MachineError: a tool is missing, the folder has machines already, or a machine does not come up.
        """
        _check_tools()
        if self.machines():
            raise MachineError(f"{self.folder} has machines already: 'wdmoe-testbed machines down' first")
        for name in arm64:
            network.node_address(name)
        hosts = [BASE_STATION, *network.nodes]
        if arm64:
            ensure_emulation("arm64")
        bases = {kind: rootfs(kind) for kind in ("amd64", *(["arm64"] if arm64 else []))}
        try:
            self._write_access(network)
            known = []
            for host in hosts:
                kind = "arm64" if host in arm64 else "amd64"
                machine = Machine(self.folder / "machines" / host, host)
                public = (self.folder / "id_ed25519.pub").read_text()
                host_key = machine.make(bases[kind], authorized_key=public, emulated=kind == "arm64")
                known.append(f"{self._address(network, host)} {host_key}\n")
            (self.folder / "known_hosts").write_text("".join(known))
            for machine in self.machines():
                namespace = namespaces.FOLDER / namespaces.namespace(network.spec.name, machine.name)
                machine.boot(namespace, emulated=machine.name in arm64)
            for machine in self.machines():
                self._wait(network, machine, emulated=machine.name in arm64)
            self._write_inventory(network, arm64, bundle, experts)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Shut all machines down, and delete them and their keys.

        Raises:
            MachineError: a machine does not end.
        """
        for machine in self.machines():
            machine.remove()
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "machines").rmdir()
        for name in (INVENTORY, "ssh", "id_ed25519", "id_ed25519.pub", "known_hosts"):
            (self.folder / name).unlink(missing_ok=True)

    def _write_access(self, network: EmulatedNetwork) -> None:
        (self.folder / "machines").mkdir(parents=True, exist_ok=True)
        key = self.folder / "id_ed25519"
        for path in (key, key.with_suffix(".pub")):
            path.unlink(missing_ok=True)
        make_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
        subprocess.run(make_key, check=True, timeout=30)
        options = f"-i {key} -o UserKnownHostsFile={self.folder / 'known_hosts'} -o StrictHostKeyChecking=yes"
        prefix = " ".join(network.bs_prefix())
        self.ssh.write_text(
            f'#!/bin/sh\n# ssh from the network namespace of the base station\nexec {prefix} ssh {options} "$@"\n'
        )
        self.ssh.chmod(0o755)

    def _address(self, network: EmulatedNetwork, host: str) -> str:
        return network.bs_address if host == BASE_STATION else network.node_address(host)

    def _wait(self, network: EmulatedNetwork, machine: Machine, *, emulated: bool) -> None:
        target = f"{'root' if emulated else USER}@{self._address(network, machine.name)}"
        timeout_s = _EMULATED_BOOT_S if emulated else _BOOT_S
        command = [str(self.ssh), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", target, "true"]
        deadline = time.monotonic() + timeout_s
        reason = ""
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                done = run_parsed(command, timeout_s=60)
                if done.returncode == 0:
                    return
                reason = done.stderr.strip()
            if machine.process() is None:
                raise MachineError(f"machine {machine.name} has ended: {machine.last_log_line()}")
            time.sleep(1)
        raise MachineError(f"machine {machine.name} can't be logged in to after {timeout_s:.0f} s: {reason}")

    def _write_inventory(self, network: EmulatedNetwork, arm64: Collection[str], bundle: Path, experts: int) -> None:
        nodes = network.nodes
        shares = {name: [e for e in range(experts) if e % len(nodes) == k] for k, name in enumerate(nodes)}
        inventory = {
            "all": {
                "vars": {
                    "ansible_user": USER,
                    "ansible_ssh_executable": str(self.ssh),
                    "wdmoe_bundle": str(bundle),
                    "wdmoe_keys": "keys",
                },
                "children": {
                    "base_station": {
                        "hosts": {BASE_STATION: {"ansible_host": network.bs_address, "wdmoe_extra": "bs"}}
                    },
                    "nodes": {
                        "hosts": {
                            name: {
                                "ansible_host": network.node_address(name),
                                "wdmoe_experts": f"L*:E{','.join(map(str, shares[name]))}",
                                **({"ansible_user": "root"} if name in arm64 else {}),
                            }
                            for name in nodes
                        }
                    },
                },
            }
        }
        self.inventory.write_bytes(msgspec.yaml.encode(inventory))


def _check_tools() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise MachineError(
            f"machines need {', '.join(missing)}: apt-get install systemd-container openssh-client rsync util-linux"
        )
