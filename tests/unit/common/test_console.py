"""How commands end: exit code and one line, in this process as in one of their own."""

import errno

import click
import pytest

from common import console
from common.errors import StorageError
from tests.in_process import run_in_process


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StorageError("no room:\n free some"), 12, "wdmoe: error: no room: free some\n"),
        (click.UsageError("--x is wrong"), 2, "wdmoe: error: --x is wrong (try 'wdmoe --help')\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 12, None),
        (KeyboardInterrupt(), 130, "wdmoe: error: interrupted\n"),
        (ZeroDivisionError("by zero"), 70, None),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command
    def fail() -> None:
        raise error

    assert console.exit_code(fail, "wdmoe", []) == code
    out, err = capsys.readouterr()
    assert out == ""
    err = err.removeprefix("\n")  # click ends the line of the ^C that a terminal shows
    assert err.count("\n") == 1
    assert line in (None, err)


def test_a_command_that_works_ends_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command
    def say() -> None:
        click.echo("done")

    assert console.exit_code(say, "wdmoe", []) == 0
    assert capsys.readouterr().out == "done\n"


def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WDMOE_DEBUG", "1")

    @click.command
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        console.exit_code(fail, "wdmoe", [])


@pytest.mark.parametrize("package", ["bs_coordinator", "edge_node", "exporter", "testbed"])
def test_every_program_says_what_it_can_do(package: str) -> None:
    done = run_in_process(package, "--help")
    assert done.returncode == 0, done.stderr
    assert "Commands:" in done.stdout
    wrong = run_in_process(package, "frobnicate")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1
    assert "'frobnicate'" in wrong.stderr


@pytest.mark.parametrize("package", ["bs_coordinator", "edge_node", "exporter", "testbed"])
def test_the_short_option_for_help(package: str) -> None:
    assert run_in_process(package, "-h").stdout == run_in_process(package, "--help").stdout


@pytest.mark.parametrize("arguments", [["bs_coordinator"], ["exporter"], ["testbed"], ["testbed", "keys"]])
def test_a_group_without_a_command_prints_its_help(arguments: list[str]) -> None:
    done = run_in_process(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Commands:\n" in done.stderr
    assert "error:" not in done.stderr


def test_a_missing_module_of_ours_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'wire.nothing'", name="wire.nothing")

    assert console.exit_code(fail, "wdmoe", [], extra="bs") == 70  # a defect of ours
    assert "a defect of ours" in capsys.readouterr().err
