"""Measures the goodput of a link with iperf3 against a server on the node, in about five seconds."""

import shutil
import subprocess
import time

import msgspec

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
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_SECONDS + 15
            )
            report = msgspec.json.decode(done.stdout)
            return float(report["end"]["sum_received"]["bits_per_second"]) / 1e6
        except (subprocess.TimeoutExpired, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.3)
