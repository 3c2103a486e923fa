"""What this machine lacks for this project's commands, and what would make it faster; nothing is started or changed.

It also runs where no extra is installed, and then says only that: modules that need one are imported inside functions.
"""

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Iterator

from common.cores import usable_cores
from testbed.preflight.verdicts import Check, Level

_DISTRIBUTION = "wdmoe"
_EXTRAS = {
    "edge": "wdmoe-node",
    "bs": "wdmoe-bs",
    "exporter": "wdmoe-export",
    "testbed": "wdmoe-testbed",
    "fleet": "'wdmoe-testbed fleet'",
}
"""The extras in the order of their size, and what each of them is for."""
_OPTIONAL_EXTRAS = ("fleet",)
_TOOLS = {
    "mosquitto": ("mosquitto", "the embedded broker adds about 0.4 ms to a round trip"),
    "iperf3": ("iperf3", "'net check' and 'preflight' can't measure rates"),
    "ping": ("iputils-ping", "'net check' can't measure round trips"),
    "rsync": ("rsync", "'fleet' can't copy files to devices"),
    "tc": ("iproute2", "'wdmoe-bs shape' can't share a radio's time"),
    "setpriv": ("util-linux", "nodes go on if a command that started them is killed with SIGKILL"),
}
"""Debian package of each tool, and what is missing without it."""
# Debian keeps daemons and network tools where not every user's PATH leads.
_SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"
_DEMO_CORES = 2
_DEMO_RAM_BYTES = 3 << 30
"""What the demo's nodes, trunk and libraries take together, with some to spare."""
_DEMO_DISK_BYTES = 4 << 30
"""Model, bundle and downloads of the demo in the user's cache folder."""


def examine() -> list[Check]:
    """All checks. `fail` is what the demo can't do without; `warn` is what some commands lack, or what costs time."""
    checks = [_python(), *_extras(), *_tools()]
    if any(check.level == "fail" for check in checks):
        return [*checks, Check("machine", "unknown", "is examined once the packages are installed")]
    from testbed.preflight.machine import clock, governor, load, priority

    machine = [clock(several_machines=True), governor(), load(), priority()]
    return [*checks, _namespaces(), _cores(), _ram(), _disk(), *machine]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", "pass" if sys.version_info >= (3, 11) else "fail", f"{version}; 3.11 or newer is needed")


def _extras() -> Iterator[Check]:
    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "unknown", f"{_DISTRIBUTION} is not installed here, so its extras are not known")
        return
    for extra, use in _EXTRAS.items():
        missing = sorted(name for name in required(lines, extra) if not _is_installed(name))
        if not missing:
            yield Check(f"extra {extra}", "pass", f"installed, for {use}")
            continue
        level: Level = "warn" if extra in _OPTIONAL_EXTRAS else "fail"
        detail = f"{use} lacks {', '.join(missing)}: pip install '{_DISTRIBUTION}[{extra}]'"
        yield Check(f"extra {extra}", level, detail)


def required(lines: list[str], extra: str) -> set[str]:
    """Names of the packages that an extra brings, those of the extras that it names included.

    Args:
        lines: requirements as a package's metadata write them: `paho-mqtt<3,>=2.1; extra == "bs"`.
    """
    names: set[str] = set()
    for line in lines:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"extra\s*==\s*['\"]{extra}['\"]", marker):
            continue
        found = re.match(r"\s*([\w.-]+)\s*(?:\[([^\]]*)\])?", requirement)
        if found is None:
            continue
        if found[1] == _DISTRIBUTION:
            for inner in (found[2] or "").split(","):
                names |= required(lines, inner.strip())
        else:
            names.add(found[1])
    return names


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _tools() -> Iterator[Check]:
    for tool, (package, effect) in _TOOLS.items():
        if path := shutil.which(tool) or shutil.which(tool, path=_SYSTEM_FOLDERS):
            yield Check(tool, "pass", path)
        else:
            yield Check(tool, "warn", f"not installed: {effect} (apt install {package})")


def _namespaces() -> Check:
    from testbed.errors import PrivilegeError
    from testbed.network.namespaces import check_privileges

    try:
        check_privileges()
    except PrivilegeError as error:
        return Check("emulated Wi-Fi", "warn", str(error))
    return Check("emulated Wi-Fi", "pass", "namespaces and TAP devices can be created")


def _cores() -> Check:
    cores = usable_cores()
    if cores <= _DEMO_CORES:
        return Check(
            "cores", "warn", f"{cores}: nodes, network and trunk wait for each other; a core for each is faster"
        )
    return Check("cores", "pass", str(cores))


def _ram() -> Check:
    import psutil

    free = psutil.virtual_memory().available
    detail = f"{free / 2**30:.1f} GiB free; the demo needs {_DEMO_RAM_BYTES / 2**30:.0f}"
    return Check("RAM", "pass" if free >= _DEMO_RAM_BYTES else "warn", detail)


def _disk() -> Check:
    from common.user_folders import user_path

    cache = user_path("cache")
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    made = any((cache / "bundles").glob("*")) if (cache / "bundles").is_dir() else False
    detail = f"{free / 2**30:.1f} GiB free at {place}; the demo needs {_DEMO_DISK_BYTES / 2**30:.0f} once"
    return Check("disk", "pass" if made or free >= _DEMO_DISK_BYTES else "warn", detail)
