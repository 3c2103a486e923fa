"""Commands of a user who may read everything here and write nowhere: one line each, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.radio.traces import write_trace
from testbed.run_directory.directory import RunDir
from tests.in_process import run_in_process
from tests.needs import needs
from tests.unit.testbed.test_damaged_runs import run as finished  # noqa: F401 (a fixture)
from tests.unit.testbed.test_radio_simulation import some_trace

pytestmark = needs("setpriv")
_ONLY_READING = [
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
    *(f"--{which}=-all,+dac_read_search" for which in ("bounding-set", "inh-caps", "ambient-caps")),
]  # fmt: skip
"""Nobody, who may still read the files of the tests and the interpreter wherever they lie."""
_SCRIPT = """
import json, sys
from tests.in_process import run_in_process

if __name__ == "__main__":
    done = [run_in_process(*command) for command in json.loads(sys.argv[1])]
    json.dump([[one.returncode, one.stdout, one.stderr] for one in done], open(sys.argv[2], "w"))
"""


def test_commands_without_a_writable_folder_end_with_one_line(
    finished: RunDir,  # noqa: F811
    tmp_path: Path,
) -> None:
    if subprocess.run([*_ONLY_READING, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this container lacks CAP_DAC_READ_SEARCH")
    folder = tmp_path / "read-only"
    shutil.move(finished.path, folder / "run")
    write_trace(some_trace(), folder / "trace.npz")
    assert (
        run_in_process("testbed", "keys", "init", folder / "keys", "--node", "a", "--host", "127.0.0.1").returncode == 0
    )
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else path.stat().st_mode & 0o444)
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    pulled = "can name another folder"
    commands: list[tuple[list[object], int, str]] = [
        (["testbed", "status", "run"], 0, ""),
        (["testbed", "compare", "run", "run"], 0, ""),
        (["testbed", "note", "run", "text"], 12, "can't write run/events.jsonl"),
        (["testbed", "report", "run"], 12, "can't write the report of run"),
        (["testbed", "export", "run", "-o", "x.tar.gz"], 12, f"XDG_CONFIG_HOME {pulled}"),
        (["testbed", "export", "run", "-o", "x.tar.gz", "--plain"], 12, "can't write x.tar.gz"),
        (["testbed", "simulate", "trace.npz", "--draws", "2"], 12, "can't write runs/simulation"),
        (["testbed", "fleet", "init", "inventory.yaml"], 12, "Permission denied (inventory.yaml)"),
        (["testbed", "keys", "init", "new", "--host", "127.0.0.1"], 12, "can't write keys to new"),
        (["testbed", "keys", "add", "keys", "b"], 12, "can't write keys"),
        (["testbed", "keys", "rotate", "keys", "a"], 12, "can't write keys"),
        (["testbed", "keys", "revoke", "keys", "a"], 12, "can't write keys"),
        (["testbed", "keys", "list", "keys"], 0, ""),
        (["exporter", "demo-model", "out"], 12, f"XDG_CACHE_HOME {pulled}"),
    ]  # fmt: skip
    script, out = tmp_path / "script.py", tmp_path / "results.json"
    script.write_text(_SCRIPT)
    out.touch()
    os.chown(out, 65534, 65534)
    subprocess.run(
        [*_ONLY_READING, sys.executable, script, json.dumps([list(map(str, c)) for c, *_ in commands]), out],
        cwd=folder, check=True, timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for (command, code, text), (returned, _, stderr) in zip(commands, json.loads(out.read_bytes()), strict=True):
        assert returned == code, (command, stderr)
        assert text in stderr, (command, stderr)
        assert stderr.count(": error: ") == (code != 0), (command, stderr)
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before
