"""An installation without extras: every command names the one that it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import importlib.abc, importlib.metadata, json, sys

INSTALLED = {"click", "msgspec", "numpy"}
OWN = {"common", "wire", "exporter", "edge_node", "bs_coordinator", "testbed", "wdmoe", "tests"}

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in INSTALLED | OWN | sys.stdlib_module_names or top.startswith("_"):
            return None
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

sys.meta_path.insert(0, Blocked())
importlib.metadata.version = version
"""
"""Begins a program that finds no package of an extra."""
_COMMANDS = """
from tests.in_process import run_in_process
for package, *arguments in json.load(sys.stdin):
    done = run_in_process(package, *arguments)
    print(json.dumps([done.returncode, done.stderr, done.stdout]))
"""
_LINES = {
    "bs": [
        "bs_coordinator generate --bundle B --prompt Hello",
        "bs_coordinator chat --bundle B",
        "bs_coordinator serve --bundle B",
        "bs_coordinator nodes --bundle B",
        "bs_coordinator links --bundle B",
        "bs_coordinator broker",
    ],
    "edge": ["edge_node --bundle B --broker mqtt://127.0.0.1:1 --id a --experts L*:E*"],
    "exporter": [
        "exporter demo-model OUT",
        "exporter bundle B OUT",
        "exporter draft B",
        "exporter verify B",
    ],
    "testbed": [
        "testbed demo",
        "testbed up",
        "testbed bench",
        "testbed quality --data B",
        "testbed run B",
        "testbed report B",
        "testbed keys init OUT --host h",
        "testbed net up B",
    ],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, random_bundle: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, stderr and stdout of each line, all in one process that finds no package of an extra."""
    folder = tmp_path_factory.mktemp("plain")
    lines = ["testbed doctor", *(line for group in _LINES.values() for line in group)]
    commands = [[{"B": str(random_bundle), "OUT": "out"}.get(word, word) for word in line.split()] for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + _COMMANDS], cwd=folder, input=json.dumps(commands), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return {line: tuple(json.loads(out)) for line, out in zip(lines, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize(("extra", "line"), [(extra, line) for extra, lines in _LINES.items() for line in lines])
def test_the_extra_is_named(extra: str, line: str, ended: dict[str, tuple[int, str, str]]) -> None:
    code, shown, _ = ended[line]
    assert code == 52, shown
    assert shown.endswith(f"is not installed: pip install 'wdmoe[{extra}]'\n")
    assert shown.count("\n") == 1


def test_the_doctor_needs_none(ended: dict[str, tuple[int, str, str]]) -> None:
    code, errors, shown = ended["testbed doctor"]
    assert (code, errors) == (1, "")
    assert "pip install 'wdmoe[testbed]'" in shown
