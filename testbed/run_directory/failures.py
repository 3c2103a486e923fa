"""Failed attempts and pauses of a run, from its events."""

import pyarrow as pa

from testbed.run_directory.directory import RunDir
from testbed.run_directory.result_tables import FAILURES, GAPS


def failures_and_gaps(run: RunDir) -> tuple[pa.Table, pa.Table]:
    """All failed attempts, also at cells that are complete by now; and each pause before a resumption."""
    events = run.events()
    names = {cell.id: str(cell) for cell in run.cells()}
    failed = [event | {"what": names.get(event["cell"], "")} for event in events if event["event"] == "cell_failed"]
    return FAILURES.build(failed), GAPS.build(event for event in events if event["event"] == "run_resumed")
