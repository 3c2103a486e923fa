"""Ansible module: list the files of a bundle that are missing or differ from the manifest. Changes nothing.

Runs on the device with the system's own Python.
"""

import hashlib
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def wrong_files(folder: Path, files: list[dict[str, Any]]) -> list[str]:
    """Paths of the files that are missing or have another size or SHA-256."""
    return [file["path"] for file in files if not _right(folder / file["path"], file)]


def _right(path: Path, file: dict[str, Any]) -> bool:
    try:
        if path.stat().st_size != int(file["bytes"]):
            return False
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        return False
    return bool(digest.hexdigest() == file["sha256"])


def main() -> None:
    """Entry point for Ansible."""
    module = AnsibleModule(
        argument_spec={
            "folder": {"type": "path", "required": True},
            "files": {"type": "list", "elements": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    wrong = wrong_files(Path(module.params["folder"]), module.params["files"])
    module.exit_json(changed=False, wrong=wrong)


if __name__ == "__main__":
    main()
