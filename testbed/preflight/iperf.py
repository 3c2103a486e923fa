"""Measures the goodput of a link with iperf3 against a server on the node, in about five seconds."""

import shutil
import subprocess
import time

from common.child_output import run_parsed
from testbed.iperf3 import received_mbps
from testbed.preflight.verdicts import Rate

PORT = 5201
_SECONDS = 2
_CONNECT_MS = 2000
_TRIES_S = 1.0
"""Time for retries: an iperf3 server runs one test at a time, and systemd may restart it in between."""


def measure_rate(address: str) -> Rate | None:
    """Goodput to and from a host; None if iperf3 is not installed here or the host runs no iperf3 server."""
    if shutil.which("iperf3") is None:
        return None
    down_mbps = _goodput_mbps(address)
    if down_mbps is None:
        return None
    up_mbps = _goodput_mbps(address, "--reverse")
    return None if up_mbps is None else Rate(down_mbps, up_mbps, "iperf3")


def _goodput_mbps(address: str, *options: str) -> float | None:
    """Goodput in Mbit/s as the receiver measured it; None if the server can't be reached."""
    argv = ["iperf3", "--json", "-c", address, "-p", str(PORT), "-t", str(_SECONDS)]
    argv += ["--connect-timeout", str(_CONNECT_MS), *options]
    deadline = time.monotonic() + _TRIES_S
    while True:
        try:
            return received_mbps(run_parsed(argv, timeout_s=_SECONDS + 15).stdout)
        except (subprocess.TimeoutExpired, ValueError):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.3)
