"""How policies and values with intervals are written in tables and plots."""

from collections.abc import Callable, Iterable

from testbed.report.numbers.metrics import Metric
from testbed.statistics import Interval

NOTHING = "–"


def policy_label(policy: str, policies: Iterable[str]) -> str:
    """`policy` without its options if no other of `policies` has the same name."""
    name = policy.partition(":")[0]
    namesakes = {other for other in policies if other.partition(":")[0] == name}
    return name if namesakes <= {policy} else policy


def value_text(interval: Interval | None, metric: Metric) -> str:
    """A value with its interval in the metric's unit, such as `83.3 (81.0 – 85.2)`."""
    if interval is None:
        return NOTHING
    return _with_range(interval, lambda v: f"{v * metric.scale:.{metric.digits}f}")


def ratio_text(interval: Interval | None) -> str:
    """A ratio with its interval, such as `× 0.78 (0.75 – 0.82)`."""
    return NOTHING if interval is None else "× " + _with_range(interval, "{:.2f}".format)


def points_text(interval: Interval | None) -> str:
    """A difference of shares with its interval in percentage points, such as `−1.5 (−4.0 – +1.0)`."""
    return NOTHING if interval is None else _with_range(interval, lambda v: _signed(v * 100, 1))


def _with_range(interval: Interval, text: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return text(interval.value)
    return f"{text(interval.value)} ({text(interval.low)} – {text(interval.high)})"


def _signed(value: float, digits: int) -> str:
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
