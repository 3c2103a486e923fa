"""Terminals that can't show every character: no command fails for that."""

import io
import logging
import sys
from collections.abc import Callable, Iterator

import click
import msgspec
import pytest
from rich.console import Console
from rich.table import Table

import bs_coordinator.commands.main
import edge_node.cli
import exporter.cli
import testbed.cli
from bs_coordinator.commands.tables import compact_table, print_table
from common.console import LOG_FORMAT, LogFormatter, exit_code, run
from common.errors import StorageError

ROOTS: dict[str, click.Command] = {
    "wdmoe-bs": bs_coordinator.commands.main.cli,
    "wdmoe-node": edge_node.cli.cli,
    "wdmoe-export": exporter.cli.cli,
    "wdmoe-testbed": testbed.cli.cli,
}


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from _commands(inner, (*path, name))


def _shown(
    monkeypatch: pytest.MonkeyPatch, encoding: str, command: click.Command, *arguments: str
) -> tuple[object, bytes]:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        run(command, "program", extra="")
    return ended.value.code, raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_the_help_of_every_command(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, root in ROOTS.items():
        for path in _commands(root, ()):
            code, shown = _shown(monkeypatch, encoding, root, *path, "--help")
            assert code == 0, (name, path)
            assert b"Usage:" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_texts_tables_and_names_of_files(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        click.echo("😀 Ω é \udcff \x00")
        table = Table("née", "µs → ms")
        table.add_row("\udcff.onnx", "±5 😀")
        Console(highlight=False).print(table, "–", soft_wrap=True)
        with Console().status("…"):
            pass

    code, shown = _shown(monkeypatch, encoding, command)
    assert code == 0
    assert b"onnx" in shown
    if encoding == "ascii":
        assert b"\\U0001f600" in shown
    assert b"\\udcff" in shown


@pytest.mark.parametrize("make", [lambda name: msgspec.json.encode([name]), lambda name: name.encode()])
def test_a_name_that_is_not_utf_8_is_named_in_one_line(
    make: Callable[[str], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    @click.argument("name")
    def command(name: str) -> None:
        make(name)

    assert exit_code(command, "program", ["x\udcff\n'%d{y}"]) == StorageError.exit_code
    shown = capsys.readouterr().err
    assert "is not UTF-8: rename it" in shown
    assert shown.count("\n") == 1


def test_what_is_logged_is_one_line_that_commands_no_terminal() -> None:
    record = logging.LogRecord(
        "wdmoe", logging.WARNING, "file", 1, "node %s", ("\x1b[2J\r\nINFO all is well\x07 é",), None
    )
    assert LogFormatter(LOG_FORMAT).format(record).endswith("WARNING wdmoe: node \\x1b[2J INFO all is well\\x07 é")
    try:
        raise ValueError("text")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert LogFormatter(LOG_FORMAT).format(record).count("\n") >= 3, "the traceback keeps its lines"


def test_texts_of_nodes_are_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = compact_table()
    table.add_column("host")
    table.add_row("[/red] [link=http://x]:smile:[/link]")
    print_table(table)
    assert "[/red] [link=http://x]:smile:[/link]" in capsys.readouterr().out
