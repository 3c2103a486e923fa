"""A node from aarch64 wheels under emulation joins a base station here, and answers as a node here does."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from testbed.arm.boards import BOARDS
from testbed.arm.run import Settings, run_arm


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None and shutil.which("qemu-aarch64") is None,
    reason="needs qemu-user-static",
)
def test_emulated_boards_join_and_answer_as_this_machine_does(tmp_path: Path) -> None:
    settings = Settings(
        variants=["int4-b32"], boards=BOARDS, experts="L*:E0", layers=2, rows=3, tokens=0, broker="embedded",
        apt_sources=None, out=tmp_path,
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
