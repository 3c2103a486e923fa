"""The latency log: a CSV file with one row per step, layer and request to a node, appended while answers are made.

Its columns are those of the table `latency` of a run, without the mark of the warm-up.
"""

import csv
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from bs_coordinator.engine.sequence import TokenEvent
from testbed.run_directory.step_tables import LATENCY, TokenRecord

COLUMNS = tuple(column for column in LATENCY.columns if column.name != "warm_up")


class LatencyLog:
    """An open latency log."""

    def __init__(self, path: Path) -> None:
        """Make a new file.

        Raises:
            FileExistsError: the file exists; it is not overwritten.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(column.name for column in COLUMNS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, answer: int, token: int, event: TokenEvent) -> None:
        """Append the rows of one token and flush them to the operating system."""
        record = TokenRecord(
            answer=answer,
            token=token,
            warm_up=False,
            token_id=event.id,
            steps=event.steps,
            ended_unix_ns=time.time_ns(),
            ended_monotonic_ns=time.monotonic_ns(),
            log_ns=0,
            top_k=0,
        )
        for row in record.request_rows():
            self._writer.writerow(column.value(row) for column in COLUMNS)
        self._file.flush()
