"""Measures one cell that needs no nodes: `python -m testbed.experiment.one_cell RUN CELL ATTEMPT [DEVICE]`.

`testbed.experiment.parallel` starts this, and records how it ended.
"""

import sys
from contextlib import suppress
from pathlib import Path

from common.errors import WdmoeError, one_line
from testbed.experiment.runner import run_alone
from testbed.run_directory.directory import RunDir


def main() -> None:
    """Measure the cell of the command line; the last line on stderr is the error, if there is one."""
    path, wanted, attempt, *device = sys.argv[1:]
    run = RunDir(Path(path))
    with suppress(KeyboardInterrupt):  # a terminal sends it to the whole group: the parent reports it
        try:
            cell = next(cell for cell in run.cells() if cell.id == wanted)
            run_alone(run, cell, int(attempt), device[0] if device else None)
        except WdmoeError as error:
            sys.exit(one_line(error))


if __name__ == "__main__":
    main()
