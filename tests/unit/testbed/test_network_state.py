"""Files of emulated networks: one process at a time works on one, and only networks that are up leave files."""

import threading
from pathlib import Path

import pytest

from testbed.network import state


def test_a_lock_that_its_holder_removes_still_keeps_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(state, "ROOT", tmp_path / "networks")
    inside, most, turns = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(8):
            with state.locked("lab") as files:
                inside += 1
                most = max(most, inside)
                files.folder.mkdir()
                files.remove()
                turns += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == (1, 32)
    assert list((tmp_path / "networks").iterdir()) == []


def test_a_network_that_is_up_keeps_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    with state.locked("lab") as files:
        files.folder.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lab", "lab.lock"]
    assert state.known() == ["lab"]
