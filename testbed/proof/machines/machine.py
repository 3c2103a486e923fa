"""One machine: a root filesystem on an overlay, booted by systemd-nspawn in a network namespace."""

import contextlib
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

from common.child_output import run_parsed
from testbed.errors import MachineError
from testbed.proof.machines.rootfs import USER

_STOP_S = 30.0
_QEMU_CPU = "cortex-a76"
"""The Pi 5's processor; qemu's default has extensions that no board has."""

# onnxruntime reads the part number of the first core; without it, its import fails.
_CPUINFO = """processor\t: {index}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""


class Machine:
    """A machine, running or not.

    Args:
        folder: folder of all its files; must be on a filesystem that supports overlays.
        name: host name.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder.absolute()
        self.name = name
        self.root = self.folder / "root"
        self.log = self.folder / "console.log"

    def make(self, base: Path, *, authorized_key: str, emulated: bool) -> str:
        """Make the machine: a fresh overlay over a root filesystem, with keys and configuration.

        Args:
            base: root filesystem.
            authorized_key: public key for logging in.
            emulated: programs run with qemu-user, where sudo does not work, so the login user is root.

        Returns:
            Type and public host key, as in a known_hosts file.

        Raises:
            MachineError: the overlay or the host key can't be made.
        """
        for part in ("upper", "work", "root"):
            (self.folder / part).mkdir(parents=True)
        layers = f"lowerdir={base},upperdir={self.folder / 'upper'},workdir={self.folder / 'work'}"
        _run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], f"an overlay in {self.folder}")
        etc = self.root / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        host_key = etc / "ssh/ssh_host_ed25519_key"
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(host_key)], "a host key")
        ssh = self.root / ("root" if emulated else f"home/{USER}") / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        (ssh / "authorized_keys").write_text(authorized_key)
        home = ssh.parent.stat()
        for path in (ssh, ssh / "authorized_keys"):
            shutil.chown(path, home.st_uid, home.st_gid)
        units = etc / "systemd/system"
        # All machines share the kernel's clock and may not set it: chrony only measures the offset.
        _write(units / "chrony.service.d/machine.conf", "[Unit]\nConditionCapability=\n")
        _write(etc / "default/chrony", 'DAEMON_OPTS="-F 1 -x"\n')
        if emulated:
            manager = f"[Manager]\nDefaultEnvironment=QEMU_CPU={_QEMU_CPU}\nDefaultTimeoutStartSec=600\n"
            _write(etc / "systemd/system.conf.d/qemu.conf", manager)
            # qemu-user lacks the system calls by which systemd passes credentials to services; none are needed here.
            no_credentials = "[Service]\nLoadCredential=\nLoadCredentialEncrypted=\nSetCredential=\n"
            _write(units / "service.d/qemu.conf", no_credentials)
            _write(etc / "cpuinfo", "".join(_CPUINFO.format(index=i) for i in range(psutil.cpu_count() or 1)))
            node = "[Service]\nBindReadOnlyPaths=/etc/cpuinfo:/proc/cpuinfo\n"
            _write(units / "wdmoe-node.service.d/qemu.conf", node)
        return " ".join(host_key.with_suffix(".pub").read_text().split()[:2])

    def boot(self, namespace: Path, *, emulated: bool) -> None:
        """Start the machine; it keeps running when this process ends.

        Args:
            namespace: path of its network namespace.
            emulated: same as for `make`.
        """
        command = [
            "setsid", "--fork", "systemd-nspawn", "--quiet", "--boot", "--keep-unit", "--register=no",
            f"--directory={self.root}", f"--machine={self.name}", f"--network-namespace-path={namespace}",
            # No terminal: systemd would wait for a reader of its output.
            "--console=read-only", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
        ]  # fmt: skip
        if emulated:
            command.append(f"--setenv=QEMU_CPU={_QEMU_CPU}")
        with self.log.open("ab") as log:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=30, check=True)

    def process(self) -> psutil.Process | None:
        """The machine's systemd-nspawn process; None if it is not running."""
        argument = f"--directory={self.root}"
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "systemd-nspawn" and argument in (process.info["cmdline"] or ()):
                return process
        return None

    def last_log_line(self) -> str:
        """Last line of the console, or why there is none."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else "its console is empty"
        return "it was never started"

    def remove(self) -> None:
        """Shut the machine down and delete its files, also after a crash.

        Raises:
            MachineError: the machine does not end, or its files can't be deleted.
        """
        process = self.process()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                # systemd-nspawn then shuts the machine down in order.
                process.send_signal(signal.SIGTERM)
                everything = [process, *process.children(recursive=True)]
                if psutil.wait_procs([process], timeout=_STOP_S)[1]:
                    for one in everything:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            one.kill()
                    if psutil.wait_procs(everything, timeout=_STOP_S)[1]:
                        raise MachineError(f"machine {self.name} (process {process.pid}) does not end")
        if self.root.is_mount():
            _run(["umount", str(self.root)], f"the overlay of {self.name}")
        try:
            shutil.rmtree(self.folder, ignore_errors=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise MachineError(f"can't delete {self.folder}: {error.strerror}") from None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _run(command: list[str], what: str) -> None:
    done = run_parsed(command, timeout_s=60)
    if done.returncode:
        raise MachineError(f"can't make {what}: {done.stderr.strip() or f'exit code {done.returncode}'}")
