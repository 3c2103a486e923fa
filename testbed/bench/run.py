"""Runs sections one after the other. The document is rewritten after each row, so a crash loses at most one row."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common.cpu_idle import cpu_idle_disabled
from common.errors import WdmoeError
from testbed.bench.document import print_results, write_document
from testbed.bench.rows import Result, Settings, Skipped
from testbed.bench.sections.registry import SECTIONS


def run_bench(settings: Settings, sections: Sequence[str], out: Path) -> None:
    """Measure, print a table per section, and write one JSON document.

    CPU idle states are disabled where permitted: wake-up times depend on the machine and vary over minutes.

    Args:
        settings: settings for all sections.
        sections: names of `SECTIONS`; all if empty.
        out: JSON file.

    Raises:
        WdmoeError: nothing could be measured.
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
                # Continue with the other sections; the document records that this one is incomplete.
                rows.append(Skipped(section, f"ended by an error: {error}"))
            print_results(rows, settings.console)
    write_document(results, settings, out)
    settings.console.print(f"raw samples: {out}", style="dim")
    if all(isinstance(row, Skipped) for rows in results.values() for row in rows):
        raise WdmoeError("nothing could be measured: the reasons are above")
