"""Ansible module: point `current` to a release, or undo that, and remove the oldest releases.

    ROOT/releases/0.1.0-3fa9c1d2e4b5/   a virtual environment; complete if it contains `.complete`
    ROOT/current, ROOT/previous         symbolic links
    HISTORY                             a line per change, never deleted

Runs on the device with the system's own Python.
"""

import datetime
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

COMPLETE = ".complete"


class ReleaseError(Exception):
    """The requested release is not installed."""


def switch(root: Path, release: str, history: Path, *, check: bool) -> bool:
    """Make `release` current and the current one previous; return False if it is current already.

    Raises:
        ReleaseError: `release` is not completely installed.
    """
    if not check and not (root / "releases" / release / COMPLETE).exists():
        raise ReleaseError(f"release {release} is not installed")
    before = linked(root / "current")
    if before == release:
        return False
    if not check:
        if before is not None:
            _link(root / "previous", before)
        _link(root / "current", release)
        _note(history, f"switched to {release} from {before or 'nothing'}")
    return True


def restore(root: Path, release: str, previous: "str | None", history: Path, *, check: bool) -> bool:
    """Undo a switch: `release` becomes current again, and `previous` the previous one.

    The release that failed does not become the previous one, so that no later rollback returns to it.

    Raises:
        ReleaseError: `release` is not completely installed.
    """
    failed = linked(root / "current")
    changed = switch(root, release, history, check=check)
    if changed and not check:
        # Without a previous release if the switch has pruned it.
        if previous is not None and (root / "releases" / previous / COMPLETE).exists():
            _link(root / "previous", previous)
        else:
            (root / "previous").unlink(missing_ok=True)
        _note(history, f"{failed} did not serve")
    return changed


def prune(root: Path, keep: int, *, check: bool) -> list[str]:
    """Remove all releases except the newest `keep`, the current and the previous one; return their names."""
    folder = root / "releases"
    if not folder.is_dir():
        return []
    found = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    used = {linked(root / "current"), linked(root / "previous")}
    old = [path for path in found[keep:] if path.name not in used]
    for path in old if not check else ():
        shutil.rmtree(path)
    return [path.name for path in old]


def linked(link: Path) -> "str | None":
    """Name of the release that a link points to; None if there is no link."""
    return link.readlink().name if link.is_symlink() else None


def _link(link: Path, release: str) -> None:
    temporary = link.with_name(f".{link.name}.new")
    if temporary.is_symlink():
        temporary.unlink()
    temporary.symlink_to(Path("releases") / release)
    temporary.replace(link)


def _note(history: Path, what: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)  # noqa: UP017 - boards may have Python 3.10
    with history.open("a") as file:
        file.write(f"{now:%Y-%m-%dT%H:%M:%SZ} {what}\n")


def main() -> None:
    """Entry point for Ansible."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/opt/wdmoe"},
            "history": {"type": "path", "default": "/var/lib/wdmoe/releases.log"},
            "release": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["current", "restored"], "default": "current"},
            "previous": {"type": "str"},
            "keep": {"type": "int"},
        },
        supports_check_mode=True,
    )
    asked: dict[str, Any] = module.params
    root, history = Path(asked["root"]), Path(asked["history"])
    try:
        before = {name: linked(root / name) for name in ("current", "previous")}
        if asked["state"] == "restored":
            changed = restore(root, asked["release"], asked["previous"], history, check=module.check_mode)
        else:
            changed = switch(root, asked["release"], history, check=module.check_mode)
        pruned = prune(root, asked["keep"], check=module.check_mode) if asked["keep"] else []
    except (OSError, ReleaseError) as error:
        module.fail_json(msg=str(error))
    else:
        module.exit_json(changed=changed or bool(pruned), switched=changed, before=before, pruned=pruned)


if __name__ == "__main__":
    main()
