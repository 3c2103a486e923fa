"""Logs of samples: what an interrupted benchmark leaves is continued with the same code, and with no other."""

from pathlib import Path

import pytest
from msgspec import Struct

from testbed import facts
from testbed.bench.sample_log import sample_log


class Sample(Struct, frozen=True):
    """One sample."""

    prompt: int


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, bool]]:
    """The commit that this process has, and whether files differ from it."""
    now = {"is": ("a" * 40, False)}
    monkeypatch.setattr(facts, "commit", lambda: now["is"])
    return now


def _interrupted(folder: Path, prompt: int) -> None:
    def measure() -> None:
        with sample_log(folder, "chat", Sample) as log:
            log.add(Sample(prompt))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure()


def test_an_interrupted_benchmark_is_continued_and_a_finished_one_is_not(
    tmp_path: Path, code: dict[str, tuple[str, bool]]
) -> None:
    _interrupted(tmp_path / "bench", 1)
    (begun,) = (tmp_path / "bench").iterdir()
    with begun.open("ab") as file:
        file.write(b'{"prom')  # a power cut within a line
    with sample_log(tmp_path / "bench", "chat", Sample) as log:
        assert log.samples == [Sample(1)]
        log.add(Sample(2))
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["chat.jsonl"]
    assert (tmp_path / "bench" / "chat.jsonl").read_bytes() == b'{"prompt":1}\n{"prompt":2}\n'
    with sample_log(tmp_path / "bench", "chat", Sample) as log:
        assert log.samples == []


@pytest.mark.parametrize("other", [("b" * 40, False), ("a" * 40, True)])
def test_samples_of_other_code_are_not_taken(
    tmp_path: Path, code: dict[str, tuple[str, bool]], other: tuple[str, bool]
) -> None:
    _interrupted(tmp_path, 1)
    code["is"] = other
    with sample_log(tmp_path, "chat", Sample) as log:
        assert log.samples == []
