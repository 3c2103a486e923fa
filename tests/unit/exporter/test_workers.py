"""Worker processes of an export, from their side of the pipe."""

import multiprocessing

import pytest

from exporter.bundle import workers


def test_a_worker_whose_parent_leaves_an_answer_unread_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "end_with_parent", lambda: None)
    parents, workers_end = multiprocessing.Pipe()
    workers_end.send("an answer")
    parents.close()
    workers._serve(workers_end)
    workers_end.close()
