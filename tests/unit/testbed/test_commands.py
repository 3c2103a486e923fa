"""`wdmoe-testbed` as a group of commands."""

import importlib
import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from testbed import cli
from tests.in_process import run_in_process


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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--port", "8000"), "No such command 'serve': use 'wdmoe-testbed up', or 'wdmoe-bs serve'"),
        (("up", "--model", "mixtral-8x7b"), "'wdmoe-testbed up --bundle FOLDER' serves a model from"),
    ],
)
def test_what_users_look_for_elsewhere_is_named(arguments: tuple[str, ...], says: str) -> None:
    done = run_in_process("testbed", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
