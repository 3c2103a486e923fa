"""Broken inputs through the public command; the long run is `wdmoe-testbed fuzz`."""

from pathlib import Path

import msgspec
import pytest

from testbed.proof.fuzz.run import fuzz
from testbed.proof.fuzz.targets import Target
from tests.conftest import Run
from wire import status
from wire.errors import FrameError


def test_nothing_breaks_a_reader(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    done = run("testbed", "fuzz", "--frames", 40_000, "--documents", 1500, "--seed", 7, "--out", out)
    assert done.returncode == 0, done.stderr
    reports = msgspec.json.decode(out.read_bytes())["reports"]
    assert {r["target"] for r in reports} >= {"frames", "sealed", "status", "manifest", "expert"}
    for report in reports:
        assert report["findings"] == []
        assert report["refused"], report["target"]
        assert report["understood"], report["target"]  # inputs that never get past the first check find nothing
        assert report["grown_bytes"] < 64 << 20


def test_what_breaks_a_reader_is_found_and_repeats() -> None:
    def read(data: bytes) -> None:
        if data[:1] == b"b":
            raise KeyError(data)
        raise ValueError(data)

    target = Target([b"abc", b"bcd"], read, (ValueError,))
    report = fuzz("t", target, inputs=500, seed=1)
    assert report.findings
    assert sum(report.refused.values()) + len(report.findings) == 500
    assert fuzz("t", target, inputs=500, seed=1).findings == report.findings


def test_a_status_that_is_no_text_is_refused() -> None:
    with pytest.raises(FrameError):
        status.decode_status(b'{"schema":1,"node":"\xff"}', "a")
