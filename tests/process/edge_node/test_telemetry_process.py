"""The process that samples telemetry: light, restarted when it dies, and never left behind."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from edge_node.telemetry.process import TelemetryProcess
from tests.waiting import PATIENCE_S, wait_until
from wire.telemetry import decode_telemetry


def _next_sample(process: TelemetryProcess) -> bytes:
    line = wait_until(process.take, "a sample")
    assert line is not None
    return line


def test_the_process_samples_and_ends_with_its_reader() -> None:
    code = (
        "import sys, time\n"
        "from edge_node.telemetry.process import TelemetryProcess\n"
        "p = TelemetryProcess('n1', 'b1', '127.0.0.1', 1883)\n"
        "p.start()\n"
        "while p.take() is None: time.sleep(0.05)\n"
        "print(p._process.pid, flush=True)\n"
        "time.sleep(3600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        sampler = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        sampler.wait(PATIENCE_S)


def test_a_sampler_that_died_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_node.telemetry.process._START_AGAIN_S", 0.1)
    process = TelemetryProcess("n1", "b1", "127.0.0.1", 1883)
    process.start()
    try:
        first = decode_telemetry(_next_sample(process), "n1")
        assert (first.sequence, first.route, first.boot_id) == (0, "lo", "b1")
        second = decode_telemetry(_next_sample(process), "n1")
        assert second.sequence >= 1
        assert second.unix_ns > first.unix_ns
        assert process._process is not None
        process._process.kill()
        assert decode_telemetry(_next_sample(process), "n1").sequence == 0
    finally:
        process.close()


def test_the_sampler_is_light() -> None:
    code = "import sys, edge_node.telemetry.__main__; print({'numpy', 'onnxruntime', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
