"""The results of `iperf3 --json`. Pure."""

import math
import re

import msgspec

_DOCUMENT = re.compile(r"^\{.*\}\s*?$", re.MULTILINE | re.DOTALL)


def received_mbps(output: str) -> float:
    """Goodput in Mbit/s as the receiver measured it.

    Lines before and after the JSON document, such as warnings, are left out.

    Raises:
        ValueError: there is no such document, or no result in it; the message is iperf3's reason where it gives one.
    """
    document = _DOCUMENT.search(output)
    try:
        report = msgspec.json.decode(document[0] if document else "")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise ValueError("no JSON") from None
    if report.get("error"):
        raise ValueError(str(report["error"])[:200])
    try:
        mbps = float(report["end"]["sum_received"]["bits_per_second"]) / 1e6
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("no result of the receiver") from None
    if not math.isfinite(mbps) or mbps < 0:
        raise ValueError("no result of the receiver")
    return mbps
