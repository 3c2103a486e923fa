"""`wdmoe-testbed` as a group of commands."""

import importlib
import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from testbed import cli


def test_a_wheel_lacks_only_the_commands_that_prove_the_software(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    clone = set(cli.cli.commands)

    def without_proof(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "testbed.proof" else find_spec(name, package)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", without_proof)
        wheel = set(importlib.reload(cli).cli.commands)
    assert clone == set(importlib.reload(cli).cli.commands)
    assert clone - wheel == {"arm", "chaos", "link-accuracy", "machines", "soak"}
