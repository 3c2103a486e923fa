"""A whole-shape run in small: node processes on emulated links, and going on after an interruption."""

import json
import multiprocessing
from pathlib import Path

import pytest

from testbed.twin import shapes
from testbed.twin.shapes import CONFIGS
from testbed.whole_shape import arms
from testbed.whole_shape.run import run_whole_shape
from tests.unit.testbed.test_twin import SMALL


def _run(out: Path) -> None:
    """In a process of its own, which enters network namespaces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.CONFIGS, "mixtral-8x7b", {**CONFIGS["mixtral-8x7b"], **SMALL["mixtral-8x7b"]})
        patch.setattr(arms, "LINKS", ((100.0, 2.0),))
        with (out.parent / "progress").open("w") as progress:
            run_whole_shape(
                "mixtral-8x7b", out, out.parent / "bundle", layers=1, nodes=2, slices=(3,), steps=1, jobs=1,
                device="cpu", on_progress=lambda line: print(line, file=progress),
            )  # fmt: skip


def _run_elsewhere(out: Path) -> list[str]:
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(out,))
    process.start()
    process.join(600)
    assert process.exitcode == 0
    return (out.parent / "progress").read_text().splitlines()


def test_a_run_measures_all_arms_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _run_elsewhere(out)
    log = out / "samples.jsonl"
    written = log.read_text().splitlines()
    assert len(written) == 2 * 4
    assert all(row["total_ms"] > 2 for line in written for row in json.loads(line)["steps"])
    assert "| mixtral-8x7b, 1, 2 | 3 | shared-100-2 | drafts |" in (out / "table.md").read_text()
    log.write_text("\n".join(written[:-1]) + "\n" + written[-1][:50])
    assert sum("ms per token" in line for line in _run_elsewhere(out)) == 1
    again = log.read_text().splitlines()
    assert again[: len(written) - 1] == written[:-1]
    assert len(arms.read_results(log)) == len(written)
