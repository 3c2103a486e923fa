"""Lines appended to a file on a disk that fills up: all of a line or nothing, and the file can be continued."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.session_file import Asked, session_file
from bs_coordinator.links.estimator import LinkSample
from bs_coordinator.links.log import link_log, read_link_log
from common.errors import StorageError
from common.files import append_all
from exporter.bundle.journal import JournalHeader, append_entry, journal_path, read_journal, start_journal
from wire.manifest import ExpertEntry, FileEntry, Quantisation, Source

ASKED = Asked.of([1, 2, 3], SamplingConfig(), model_sha256="ab" * 32, quantisation="int4")
SAMPLE = LinkSample(time_s=1.0, node="bench-a", down_bytes=100, up_bytes=90, round_trip_s=0.01, node_s=0.001)


@contextmanager
def room_for(path: Path, more_bytes: int) -> Iterator[None]:
    """Let files grow to `more_bytes` above the length of `path`: the kernel then writes a part, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    with path.open("ab", buffering=0) as file:
        append_all(file.fileno(), b"first line\n")
        with room_for(path, 11), pytest.raises(OSError, match="File too large"):
            append_all(file.fileno(), b"14 characters\n")
        append_all(file.fileno(), b"second line\n")
    assert path.read_bytes() == b"first line\nsecond line\n"


def test_session_file_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    with session_file(path, ASKED) as session:
        session.add(17, last=False)
        with room_for(path, 4), pytest.raises(StorageError, match="can't write"):
            session.add(4711, last=False)
        session.add(18, last=False)
        assert session.ids == [17, 18]
    with session_file(path, ASKED) as session:
        assert session.ids == [17, 18]


def test_question_of_a_session_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "session.jsonl"
    path.touch()
    with room_for(path, 40), pytest.raises(StorageError), session_file(path, ASKED):
        pass
    with session_file(path, ASKED) as session:
        session.add(5, last=True)
    with session_file(path, ASKED) as session:
        assert (session.ids, session.finished) == ([5], True)


def test_link_log_ends_with_a_whole_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "links.jsonl"
    with link_log(path) as write:
        write(SAMPLE)
        with room_for(path, 30):
            write(SAMPLE)
        write(SAMPLE)  # logging has stopped
    assert "link samples are no longer logged" in caplog.text
    assert path.read_bytes().endswith(b"}\n")
    assert list(read_link_log(path)) == [SAMPLE]


def test_link_log_continues_after_a_crash_in_mid_line(tmp_path: Path) -> None:
    path = tmp_path / "links.jsonl"
    with link_log(path) as write:
        write(SAMPLE)
    path.write_bytes(path.read_bytes() + b'{"time_s":2.0,"no')
    with link_log(path) as write:
        write(SAMPLE)
    assert list(read_link_log(path)) == [SAMPLE, SAMPLE]


def test_a_foreign_file_is_not_shortened(tmp_path: Path) -> None:
    path = tmp_path / "diary.txt"
    path.write_text("Monday\nno line break here")
    with link_log(path):
        pass
    assert path.read_text() == "Monday\nno line break here"


def test_journal_row_is_written_whole(tmp_path: Path) -> None:
    source = Source(name="m", config_sha256="0" * 64, header_sha256={}, dtype="BF16")
    header = JournalHeader(
        source=source, quantisation=Quantisation(scheme="fp32"), experts="L0:E0-1", shards={}, tools={}
    )
    data = tmp_path / "experts/L00/E0.weights"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    files = (FileEntry(path="experts/L00/E0.weights", bytes=0, sha256=empty),)
    entries = [
        ExpertEntry(layer=0, expert=e, files=files, probe_output="", error=0.0, source_sha256=empty) for e in range(2)
    ]
    start_journal(tmp_path, header, {})
    before = journal_path(tmp_path).read_bytes()
    with room_for(journal_path(tmp_path), 11), pytest.raises(StorageError, match="can't write"):
        append_entry(tmp_path, entries[0])
    assert journal_path(tmp_path).read_bytes() == before
    append_entry(tmp_path, entries[1])
    assert list(read_journal(tmp_path, header)) == [entries[1].id]
