"""What is concluded from layers that were asked of an idle fleet."""

import pytest

from testbed.bench.fleet_parts import LayerSamples, summarise


def _layers(at_once: int, rows: int, compute_ms: float, *, per_request_ms: float = 0.2) -> LayerSamples:
    sent = at_once * (200 + rows * 16_000)
    rest = 0.5 + per_request_ms * at_once + 4e-6 * sent
    noise = (0.0, -0.01, 0.01, 30.0, 0.0)  # one layer was interrupted
    return LayerSamples(at_once, rows, tuple(compute_ms + n for n in noise), tuple(rest + n for n in noise), sent)


CASES = [(1, 1, 4.0), (2, 1, 4.2), (4, 1, 4.8), (8, 1, 6.0), (1, 4, 7.0), (1, 8, 9.0), (8, 8, 12.0)]


def test_costs_are_found_again() -> None:
    parts = summarise([_layers(*case) for case in CASES])
    assert parts.unit_ms.at([1, 4, 8, 12]) == pytest.approx([4, 7, 9, 11])
    assert parts.crowd.at([1, 2, 3, 8]) == pytest.approx([1, 1.05, 1.125, 1.5])
    assert (parts.layer_ms, parts.request_ms, parts.byte_ms) == pytest.approx((0.5, 0.2, 4e-6))


def test_no_cost_is_negative() -> None:
    parts = summarise([_layers(*case, per_request_ms=-0.05) for case in CASES])
    assert min(parts.layer_ms, parts.request_ms, parts.byte_ms) == 0
