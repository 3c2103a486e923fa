"""All sections, one after the other; the document is written again after each row, so that a crash loses one."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.cpu_idle import cpu_idle_disabled
from common.errors import WdmoeError
from testbed.bench.document import print_results, write_document
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sections.registry import SECTIONS


def run_bench(settings: Settings, sections: Sequence[str], out: Path) -> None:
    """Measure, print a table per section, write one JSON document. Cores stay awake where that can be had: what a
    sleeping one takes to wake is the machine's, and differs from minute to minute.

    Args:
        sections: names of `SECTIONS`; all when empty.

    Raises:
        WdmoeError: something that a benchmark needs does not come up; what was measured before is kept.
    """
    results: dict[str, list[Result]] = {}
    with cpu_idle_disabled() as stays_awake:
        settings = replace(settings, stays_awake=stays_awake)
        for section in sections or tuple(SECTIONS):
            settings.console.rule(section, align="left")
            rows = results[section] = []
            try:
                for row in importlib.import_module(SECTIONS[section]).measure(settings):
                    rows.append(row)
                    write_document(results, settings, out)
            except WdmoeError as error:
                # The other sections may still be measured; the document says that this one is not whole.
                rows.append(Skipped(section, f"ended by an error: {error}"))
            print_results(rows, settings.console)
    write_document(results, settings, out)
    settings.console.print(f"raw samples: {out}", style="dim")
    if not any(isinstance(row, Row) for rows in results.values() for row in rows):
        raise WdmoeError("nothing could be measured")
