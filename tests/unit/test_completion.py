"""Shells complete the commands and options of all four programs, as docs/commands.md says."""

import importlib
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

DOCS = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
PROGRAMS = {
    "wdmoe-export": "exporter.cli",
    "wdmoe-node": "edge_node.cli",
    "wdmoe-bs": "bs_coordinator.commands.main",
    "wdmoe-testbed": "testbed.cli",
}


def _completions(program: str, words: list[str], begun: str) -> set[str]:
    group: click.Group = importlib.import_module(PROGRAMS[program]).cli
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    assert f"{variable}=bash_source {program}" in DOCS
    return {item.value for item in BashComplete(group, {}, program, variable).get_completions(words, begun)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_and_option_is_completed(program: str) -> None:
    group: click.Group = importlib.import_module(PROGRAMS[program]).cli
    commands = {name: command for name, command in group.commands.items() if not command.hidden}
    assert len(commands) > 1
    assert _completions(program, [], "") == {*commands}
    for name, command in commands.items():
        assert _completions(program, [], name[:-1]) >= {name}
        found = _completions(program, [name], "--")
        if isinstance(command, click.Group):
            assert _completions(program, [name], "") == {*command.commands}
            continue
        options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
        assert {max(option.opts, key=len) for option in options} <= found | {"-f"}


def test_without_a_command_a_node_completes_the_options_of_serve() -> None:
    assert "--experts" in _completions("wdmoe-node", [], "--e")
