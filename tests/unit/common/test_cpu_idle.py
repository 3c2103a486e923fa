"""`cpu_idle_disabled` keeps cores awake while it is held, and does nothing where the kernel does not allow it."""

import os
import struct
from pathlib import Path

import pytest

from common.cpu_idle import DEVICE, cpu_idle_disabled


def _held_us() -> int:
    """The shortest wake-up latency that any process has requested, in µs."""
    with DEVICE.open("rb", buffering=0) as file:
        value: int = struct.unpack("=i", file.read(4))[0]
    return value


@pytest.mark.skipif(not os.access(DEVICE, os.R_OK | os.W_OK), reason="needs /dev/cpu_dma_latency")
def test_the_request_to_the_kernel_is_released() -> None:
    before = _held_us()
    with cpu_idle_disabled() as held:
        assert held
        assert _held_us() == 0
    assert _held_us() == before


def test_without_the_device_the_reason_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = tmp_path / "cpu_dma_latency"
    with cpu_idle_disabled(missing) as held:
        assert not held
    assert f"can't open {missing}: No such file or directory" in caplog.text
    assert not missing.exists()
