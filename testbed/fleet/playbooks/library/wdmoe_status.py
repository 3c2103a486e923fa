"""Ansible module: release, service state and resources of a device. Changes nothing; unknown values are null.

Runs on the device with the system's own Python.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

_OFFSET = re.compile(r"System time\s*:\s*([\d.]+) seconds (slow|fast)")


def clock_offset_ms(tracking: str) -> "float | None":
    """Offset of this clock from its source, from the output of `chronyc tracking`; positive if it is fast."""
    match = _OFFSET.search(tracking)
    return None if match is None else round(1e3 * float(match[1]) * (1 if match[2] == "fast" else -1), 3)


def _ask(*command: str) -> str:
    if shutil.which(command[0], path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        return ""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=False, env={**os.environ, "LC_ALL": "C"}
    ).stdout


def _link(path: Path) -> "str | None":
    return path.readlink().name if path.is_symlink() else None


def main() -> None:
    """Entry point for Ansible."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "state": {"type": "path", "required": True},
            "service": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    root, state, service = Path(module.params["root"]), Path(module.params["state"]), module.params["service"]
    shown = _ask("systemctl", "show", service, "-p", "ActiveState,SubState,NRestarts,MemoryCurrent,Result")
    facts: dict[str, Any] = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    memory = facts.get("MemoryCurrent", "")
    disk = shutil.disk_usage(state if state.is_dir() else "/")
    module.exit_json(
        changed=False,
        release=_link(root / "current"),
        previous=_link(root / "previous"),
        service=f"{facts.get('ActiveState', 'unknown')} ({facts.get('SubState', '')})",
        restarts=int(facts.get("NRestarts") or 0),
        memory_bytes=int(memory) if memory.isdigit() else None,
        disk_free_bytes=disk.free,
        clock_offset_ms=clock_offset_ms(_ask("chronyc", "tracking")),
    )


if __name__ == "__main__":
    main()
