"""The metrics of a report with their formulas over units; docs/experiments.md lists them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from testbed.report.numbers.units import Units
from testbed.statistics import Measure, Proportion, Quantile, Ratio, Share

_MS = 1e-6


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: name in `summary.json`.
        title: name and unit in tables.
        digits: decimals in tables.
        make: makes the statistic of some units; None if they don't have the data.
        scale: factor from the unit in `summary.json` to the unit of the title.
        points: whether differences are given in percentage points instead of ratios.
    """

    name: str
    title: str
    digits: int
    make: Callable[[Units], Measure | None]
    scale: float = 1.0
    points: bool = False


def _ratio(numerator: str, denominator: str, scale: float = 1.0) -> Callable[[Units], Measure | None]:
    def make(units: Units) -> Measure | None:
        return Ratio(units.sum(numerator), units.sum(denominator), scale) if units.has(denominator) else None

    return make


def _token_quantile(share: float) -> Callable[[Units], Measure | None]:
    def make(units: Units) -> Measure | None:
        quantile = Quantile(units.token_ns(), share, _MS)
        return quantile if quantile.enough else None

    return make


def _dropped(units: Units) -> Measure | None:
    asked, full = units.sum("pairs"), units.sum("full_pairs")
    return Share(full - asked, full) if units.has("full_pairs") else None


def _bytes(units: Units) -> Measure | None:
    """Bytes per token that went through the model; a step of a batch has many tokens."""
    tokens = units.sum("step_tokens")
    return Ratio(units.sum("down_bytes") + units.sum("up_bytes"), tokens) if tokens.any() else None


def _probe_bytes(units: Units) -> Measure | None:
    """As `_bytes`, of probes of links; nothing for a run that did not count them."""
    tokens = units.sum("probe_counted_tokens")
    return Ratio(units.sum("probe_down_bytes") + units.sum("probe_up_bytes"), tokens) if tokens.any() else None


def _probe_share(units: Units) -> Measure | None:
    probes = units.sum("probe_down_bytes") + units.sum("probe_up_bytes")
    total = probes + units.sum("down_bytes") + units.sum("up_bytes")
    return Share(probes, total) if units.has("probe_counted_tokens") and total.any() else None


def _prediction_error(units: Units) -> Measure | None:
    quantile = Quantile(units.errors(), 0.5)
    return quantile if quantile.enough else None


def _accuracy(units: Units) -> Measure | None:
    return Proportion(units.sum("right"), units.sum("items")) if units.has("items") else None


def _perplexity(units: Units) -> Measure | None:
    if not units.has("predicted_tokens"):
        return None
    return Ratio(units.sum("loss_nats"), units.sum("predicted_tokens"), exponential=True)


TOKEN_METRICS = (
    Metric("token_ms", "mean ms/token", 1, _ratio("total_ns", "tokens", _MS)),
    Metric("token_median_ms", "median ms/token", 1, _token_quantile(0.5)),
    Metric("token_p95_ms", "p95 ms/token", 1, _token_quantile(0.95)),
    Metric("ttft_ms", "TTFT, ms", 0, _ratio("first_token_ns", "answers", _MS)),
)
PARTS = ("trunk", "network", "compute", "wait", "framing")
PART_METRICS = tuple(Metric(f"{part}_ms", f"{part} ms/token", 2, _ratio(f"{part}_ns", "tokens", _MS)) for part in PARTS)
NODE_METRICS = (
    Metric("layer_wait_ms", "layer wait, ms", 2, _ratio("dispatch_ns", "layers", _MS)),
    Metric("requests_per_layer", "requests/layer", 2, _ratio("requests", "layers")),
    Metric("bytes_per_token", "KiB/token", 1, _bytes, scale=1 / 1024),
    Metric("probe_bytes_per_token", "probes, KiB/token", 1, _probe_bytes, scale=1 / 1024),
    Metric("probe_share", "probes, % of all bytes", 1, _probe_share, scale=100.0, points=True),
    Metric("prediction_error", "median error of predicted round trips, %", 1, _prediction_error, 100.0, points=True),
)
STEP_METRICS = (
    Metric("dropped_share", "dropped, %", 1, _dropped, scale=100.0, points=True),
    Metric("predicted_layer_wait_ms", "predicted layer wait, ms", 2, _ratio("predicted_ns", "predicted_layers", _MS)),
)
ITEM_METRICS = (
    Metric("accuracy", "accuracy, %", 1, _accuracy, scale=100.0, points=True),
    Metric("perplexity", "perplexity", 3, _perplexity),
)
METRICS = {
    metric.name: metric
    for metric in (*TOKEN_METRICS, *PART_METRICS, *NODE_METRICS, *STEP_METRICS, *ITEM_METRICS)
}  # fmt: skip
SAME_TOKENS = Metric("same_tokens_share", "same tokens as baseline, %", 1, lambda units: None, 100.0, points=True)


def same_tokens(units: Units, baseline: Units) -> Measure:
    """Share of tokens before the first difference, over the tokens of the longer answer of each pair.

    Args:
        units, baseline: answers paired by the caller: unit k of one belongs to unit k of the other.
    """
    both = list(zip(units.ids(), baseline.ids(), strict=True))
    prefix = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair))) for pair in both
    ]
    return Share(np.array(prefix, float), np.array([max(map(len, pair)) for pair in both], float))
