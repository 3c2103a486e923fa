"""Debian root filesystems, made once by debootstrap and kept in the user's cache folder.

They contain what a board's image contains: systemd, sshd, Python, rsync, a user with sudo. Each machine runs on an
overlay above them, so it starts fresh.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.child_output import run_parsed
from common.user_folders import user_path
from testbed.errors import MachineError

USER = "pi"
"""Login user, as on a board's image: not root, but with sudo without a password."""

ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
_PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "openssh-server", "sudo", "python3", "rsync", "chrony", "iproute2",
    "iputils-ping", "iperf3", "procps", "ca-certificates",
)  # fmt: skip
_BROKER = "mosquitto"
_BUILD_S = 3600.0
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_BINFMT_RULE = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")

_FINISH = f"""
set -e
useradd --create-home --shell /bin/bash {USER}
echo '{USER} ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/{USER}
chmod 440 /etc/sudoers.d/{USER}
printf 'PasswordAuthentication no\\nUseDNS no\\n' > /etc/ssh/sshd_config.d/machines.conf
# Debian's package enables the broker; on a fresh board there is none yet.
[ ! -e /usr/sbin/mosquitto ] || systemctl disable mosquitto
systemctl disable chrony apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer console-getty
systemctl mask getty.target
rm -f /etc/ssh/ssh_host_* /etc/machine-id /var/lib/dbus/machine-id
: > /etc/machine-id
rm -rf /var/cache/apt/archives/*.deb /var/lib/apt/lists/*
"""


def rootfs(architecture: str) -> Path:
    """Folder of a root filesystem with this machine's Debian release; made if missing.

    Args:
        architecture: `amd64` or `arm64`.

    Raises:
        MachineError: a tool is missing, or debootstrap fails.
    """
    _need("debootstrap", "chroot")
    mirror, release = debian_mirror()
    recipe = hashlib.sha256(repr((_packages(architecture), _FINISH)).encode()).hexdigest()[:8]
    folder = user_path("cache") / "rootfs" / f"debian-{release}-{architecture}-{recipe}"
    if not folder.is_dir():
        if ARCHITECTURES[architecture] != platform.machine():
            ensure_emulation(architecture)
        with _part(folder) as part:
            _build(part, architecture, release, mirror)
    return folder


def debian_mirror() -> tuple[str, str]:
    """URL of apt's Debian mirror, and the code name of the installed release.

    Raises:
        MachineError: this machine does not run Debian, or apt has no Debian mirror.
    """
    facts = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )  # fmt: skip
    release = facts.get("VERSION_CODENAME", "").strip('"')
    if facts.get("ID", "").strip('"') != "debian" or not release:
        raise MachineError(
            "machines are made by debootstrap from apt's Debian mirror: this machine does not run Debian"
        )
    _need("apt-get")
    targets = ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(COMPONENT) $(CREATED_BY)"]
    listed = run_parsed(targets, timeout_s=60).stdout
    for line in listed.splitlines():
        site, *rest = line.split()
        if rest == [release, "main", "Packages"]:
            return site, release
    raise MachineError(f"apt has no package list of Debian {release}: run 'apt-get update'")


def ensure_emulation(architecture: str) -> None:
    """Register qemu-user in the kernel for programs of another architecture, with the rule of Debian's package.

    Raises:
        MachineError: qemu-user is not installed, or the kernel rejects it.
    """
    if architecture != "arm64":
        raise MachineError(f"machines of {architecture} need a machine of {ARCHITECTURES[architecture]}")
    if (_BINFMT / "qemu-aarch64").exists():
        return
    if not _BINFMT_RULE.exists():
        raise MachineError("arm64 machines need qemu-user: apt-get install qemu-user-static")
    try:
        if not (_BINFMT / "register").exists():
            subprocess.run(
                ["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)], check=True, capture_output=True, timeout=30
            )
        (_BINFMT / "register").write_text(_BINFMT_RULE.read_text())
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(f"the kernel rejects qemu-user for arm64 programs: {error}") from None


def _build(folder: Path, architecture: str, release: str, mirror: str) -> None:
    command = [
        "debootstrap",
        f"--arch={architecture}",
        "--variant=minbase",
        f"--include={','.join(_packages(architecture))}",
    ]
    _run([*command, release, str(folder), mirror], "debootstrap")
    _run(["chroot", str(folder), "/bin/sh", "-c", _FINISH], "finishing the root filesystem")


def _packages(architecture: str) -> tuple[str, ...]:
    """Packages of a root filesystem. Only native ones have a broker: emulated base stations would be too slow."""
    return (*_PACKAGES, _BROKER) if ARCHITECTURES[architecture] == platform.machine() else _PACKAGES


def _run(command: list[str], what: str) -> None:
    try:
        done = run_parsed(command, timeout_s=_BUILD_S)
    except subprocess.TimeoutExpired:
        raise MachineError(f"{what} took more than {_BUILD_S:.0f} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise MachineError(f"{what} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")


def _need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise MachineError(f"{', '.join(missing)} missing: apt-get install debootstrap")


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to `folder` if the body succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir()
    # The root folder of a system must be readable by all users.
    part.chmod(0o755)
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
