"""Ansible module: start a service, or restart it if a file that it depends on has changed since its start.

Unlike a notified handler, comparing times also works after a deployment that was interrupted before the restart.
Runs on the device with the system's own Python.
"""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule


def newest_change(paths: Iterable[Path]) -> float:
    """Latest change time (ctime, Unix seconds) of these files and links, and of the direct entries of folders."""
    newest = 0.0
    for path in paths:
        entries = [path, *(path.iterdir() if path.is_dir() and not path.is_symlink() else ())]
        # Not the modification time, which copies preserve.
        newest = max([newest, *(entry.lstat().st_ctime for entry in entries)])
    return newest


def started_at(pid: int) -> float:
    """Start time of a process, Unix seconds; 0 if `pid` is 0."""
    if pid == 0:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    boot = next(
        int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime")
    )
    return boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Entry point for Ansible."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "paths": {"type": "list", "elements": "path", "required": True},
            "timeout_s": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    unit, timeout_s = module.params["name"], module.params["timeout_s"]
    paths = [Path(path) for path in module.params["paths"]]

    def systemctl(*arguments: str) -> "subprocess.CompletedProcess[str]":
        c_locale = {**os.environ, "LC_ALL": "C"}
        return subprocess.run(
            ["systemctl", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=c_locale,
        )

    shown = systemctl("show", unit, "-p", "ActiveState,MainPID,UnitFileState,NeedDaemonReload").stdout
    facts = dict(line.split("=", 1) for line in shown.splitlines())
    begun = started_at(int(facts.get("MainPID", "0") or 0))
    # In check mode files may not exist yet. 1 s of tolerance: the boot time is rounded to seconds.
    missing = module.check_mode and not all(os.path.lexists(path) for path in paths)
    stale = missing or newest_change(paths) > begun + 1.0
    steps = []
    if facts.get("NeedDaemonReload") == "yes":
        steps.append(["daemon-reload"])
    if facts.get("UnitFileState") != "enabled":
        steps.append(["enable", unit])
    if facts.get("ActiveState") != "active" or stale:
        steps += [["daemon-reload"], ["reset-failed", unit], ["restart", unit]]
    if not module.check_mode:
        for step in steps:
            done = systemctl(*step)
            if done.returncode and step[0] != "reset-failed":
                module.fail_json(msg=f"systemctl {' '.join(step)}: {done.stderr.strip()}", last_words=last_words(unit))
    module.exit_json(changed=bool(steps), steps=[" ".join(step) for step in steps])


def last_words(unit: str) -> "list[str]":
    """The last 20 lines of the service's journal."""
    return subprocess.run(
        ["journalctl", "--no-pager", "-o", "cat", "-n", "20", "-u", unit],
        capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False,
        env={**os.environ, "LC_ALL": "C"},
    ).stdout.splitlines()  # fmt: skip


if __name__ == "__main__":
    main()
