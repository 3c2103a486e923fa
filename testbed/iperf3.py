"""The results of `iperf3 --json`. Pure."""

import math

import msgspec


def received_mbps(output: str) -> float:
    """Goodput in Mbit/s as the receiver measured it.

    Lines before and after the JSON document, such as warnings, are left out.

    Raises:
        ValueError: there is no such document, or no result in it; the message is iperf3's reason where it gives one.
    """
    try:
        report = msgspec.json.decode(output[output.find("{") : output.rfind("}") + 1])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise ValueError("no JSON") from None
    if "error" in report:
        raise ValueError(str(report["error"])[:200])
    try:
        mbps = float(report["end"]["sum_received"]["bits_per_second"]) / 1e6
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("no result of the receiver") from None
    if not math.isfinite(mbps) or mbps < 0:
        raise ValueError("no result of the receiver")
    return mbps
