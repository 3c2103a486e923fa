"""What tests need from the machine, named in one place: the end of a run lists what to install (`missing_packages`)."""

import re
import shutil
from collections.abc import Iterable

import pytest

from testbed.errors import PrivilegeError
from testbed.network.namespaces import check_privileges

# Debian packages by the command that tests call.
PACKAGES = {
    "ansible-playbook": "ansible-core",
    "faketime": "faketime",
    "ip": "iproute2",
    "iperf3": "iperf3",
    "mosquitto": "mosquitto",
    "mosquitto_sub": "mosquitto-clients",
    "mount": "mount",
    "ping": "iputils-ping",
    "promtool": "prometheus",
    "qemu-aarch64-static": "qemu-user-static",
    "setpriv": "util-linux",
    "tc": "iproute2",
    "unshare": "util-linux",
}
_NOT_INSTALLED = "not installed: "
# Debian keeps daemons and network tools where not every user's PATH leads.
_SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"


def reason_to_skip(*commands: str, network: bool = False) -> str:
    """Why a test can't run here; empty if it can.

    Args:
        commands: system commands, keys of `PACKAGES`.
        network: whether the test makes network namespaces, which needs root.
    """
    missing = [c for c in commands if not (shutil.which(c) or shutil.which(c, path=_SYSTEM_FOLDERS))]
    if missing:
        return _NOT_INSTALLED + " ".join(sorted(PACKAGES[c] for c in missing))
    if network:
        try:
            check_privileges()
        except PrivilegeError as error:
            return str(error)
    return ""


def needs(*commands: str, network: bool = False) -> pytest.MarkDecorator:
    """Mark a test, or with `pytestmark` a module, to be skipped where something is missing (`reason_to_skip`)."""
    reason = reason_to_skip(*commands, network=network)
    return pytest.mark.skipif(bool(reason), reason=reason)


def skip_without(*commands: str, network: bool = False) -> None:
    """Skip the running test, from a fixture, where something is missing (`reason_to_skip`)."""
    if reason := reason_to_skip(*commands, network=network):
        pytest.skip(reason)


def missing_packages(reasons: Iterable[str]) -> tuple[int, list[str]]:
    """How many of these reasons to skip are missing system packages, and the packages' names."""
    found = [match[1].split() for r in reasons if (match := re.search(f"{_NOT_INSTALLED}(.*)", r))]
    return len(found), sorted({package for packages in found for package in packages})
