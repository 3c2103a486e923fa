"""Writes everything that `wdmoe-testbed report` adds to a run's folder."""

import shutil
import tempfile
from pathlib import Path

from common.console import describe_os_error
from common.errors import StorageError
from testbed.errors import RunDirectoryError
from testbed.report.merge import Merger
from testbed.report.numbers.analysis import analyse
from testbed.report.numbers.summary import Summary, encode, summarise
from testbed.report.page.contents import contents
from testbed.report.page.document import html, markdown
from testbed.report.page.plots import draw_plots
from testbed.report.trace import TOKENS_PER_CELL, Trace
from testbed.run_directory.cell_rows import CellRows
from testbed.run_directory.directory import RunDir
from testbed.statistics import RESAMPLES

PAGE = "report.html"


def write_report(run: RunDir, *, resamples: int = RESAMPLES, trace_tokens: int = TOKENS_PER_CELL) -> Summary:
    """Write merged tables, summary, plots, trace and report; equal cells give equal files.

    All files are written to a temporary folder and moved when they are complete, the HTML page last.

    Args:
        resamples: bootstrap resamples per interval.
        trace_tokens: tokens of each cell in the trace.

    Raises:
        RunDirectoryError: no cell is complete yet, or a cell is damaged.
        StorageError: the folder can't be written.
    """
    try:
        made = Path(tempfile.mkdtemp(prefix=".report-", dir=run.path))
        try:
            summary = _make(run, made, resamples, trace_tokens)
            _move(made, run.path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"can't write the report of {run.path}: {describe_os_error(error)}") from error
    return summary


def _make(run: RunDir, folder: Path, resamples: int, trace_tokens: int) -> Summary:
    trace = Trace(trace_tokens)
    with Merger(run, folder) as merger:

        def also(rows: CellRows) -> None:
            merger.add(rows)
            trace.add(rows)

        analysis = analyse(run, also=also)
        merger.add_events()
    if not analysis.complete:
        raise RunDirectoryError(f"{run.path} has no complete cell yet: nothing to report")
    summary = summarise(analysis, resamples=resamples)
    figures = draw_plots(analysis, summary, folder)
    document = contents(run, summary, figures)
    (folder / "trace.json").write_bytes(trace.encode())
    (folder / "summary.json").write_bytes(encode(summary))
    (folder / "report.md").write_text(markdown(document), encoding="utf-8")
    (folder / PAGE).write_text(html(document, folder), encoding="utf-8")
    return summary


def _move(made: Path, target: Path) -> None:
    shutil.rmtree(target / "plots", ignore_errors=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == PAGE):
        path.replace(target / path.name)
