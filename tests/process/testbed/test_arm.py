"""A node from aarch64 wheels under emulation joins a base station here, and answers as a node here does."""

from pathlib import Path

import pytest
from rich.console import Console

from testbed.errors import EmulationError
from testbed.proof.arm import userland
from testbed.proof.arm.agreement import BoardResult, markdown
from testbed.proof.arm.boards import BOARDS
from testbed.proof.arm.run import Settings, run_arm
from tests.needs import needs


@pytest.mark.slow
@needs("qemu-aarch64-static", "mosquitto")
def test_emulated_boards_join_and_answer_as_this_machine_does(tmp_path: Path) -> None:
    settings = Settings(
        variants=["int4-b32"], boards=BOARDS, experts="L*:E0", layers=2, rows=3, tokens=0, apt_sources=None,
        out=tmp_path,
    )  # fmt: skip
    results = run_arm(settings, Console(quiet=True))
    assert [(r.node["arch"], r.device["profile"], r.experts) for r in results] == [
        ("aarch64", board.name, ["L00:E0", "L01:E0"]) for board in BOARDS
    ]
    # run_arm raises where answers differ by more than they may; that they differ at all shows that they are the
    # boards' own: without dot product onnxruntime computes otherwise.
    with_dot, without = results
    assert 0 < max(with_dot.difference) < max(without.difference)
    assert (tmp_path / "agreement.json").exists()
    assert "| int4 b32 | pi4 | 2 |" in (tmp_path / "agreement.md").read_text()


def test_without_qemu_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulationError, match="qemu-user-static"):
        userland.prepare(tmp_path / "cache", on_progress=lambda what: None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("difference", "agrees"), [(0.001, True), (0.004, False), (float("nan"), False)])
def test_differences_beyond_the_tolerance_and_nan_are_reported(difference: float, agrees: bool) -> None:
    result = BoardResult(
        board="pi5", variant="int4-b32", quantisation="int4 b32", tolerance=0.003, why="codes", experts=["L00:E0"],
        difference=[difference], error=[0.1], error_here=[0.1], together=[0.0], tokens=[1, 2, 3],
        tokens_here=[1, 2, 4], node={}, device={},
    )  # fmt: skip
    assert result.agrees is agrees
    assert ("above" in markdown([result])) is not agrees
    assert result.equal_tokens == 2
