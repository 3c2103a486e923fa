"""Experts that the base station keeps: which, that nothing changes but the time, and that they replace lost nodes."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_coordinator.resident import ResidentExperts, Traffic, read_traffic, traffic_of_log
from bs_coordinator.resident.choice import choose_resident
from bs_coordinator.resident.traffic import HALVED_AT, write_traffic
from bs_coordinator.resident.wire_rounding import round_to_wire
from common.errors import StorageError
from edge_node.errors import MemoryBudgetError
from edge_node.experts.memory import largest, needed_bytes
from edge_node.experts.runtime import ExpertRuntime
from tests.waiting import wait_until
from wire import tensors
from wire.experts import ExpertId
from wire.frames import ExpertRows
from wire.manifest import Dims, Scheme, load_manifest
from wire.probe import probe_input
from wire.tensors import WireDtype

Bundle = Callable[[Scheme], Path]
DIMS = Dims(hidden=8, intermediate=8, layers=2, experts=4, top_k=2, vocab=8, max_positions=8)
HERE_S, AWAY_S = 0.001, 0.010


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(width=32, allow_nan=False)),
    st.sampled_from(WireDtype),
)
def test_resident_experts_inputs_and_outputs_are_rounded_as_on_the_wire(x: tensors.Array, dtype: WireDtype) -> None:
    arrived = dtype.round_trip(x)
    np.testing.assert_array_equal(round_to_wire(x, dtype).view(np.uint32), arrived.view(np.uint32))


def _pairs(counts: dict[tuple[int, int, int], float], layers: int = 2, experts: int = 4) -> np.ndarray:
    """[layers, experts, experts] of tokens by layer and the two experts that they were sent to."""
    pairs = np.zeros((layers, experts, experts))
    for (layer, a, b), n in counts.items():
        for at in {(a, a), (b, b), (a, b), (b, a)}:
            pairs[(layer, *at)] += n
    return pairs


def _waited_s(pairs: np.ndarray, away_s: np.ndarray, kept: set[ExpertId]) -> float:
    """By the definition: each token's layer waits for its slowest expert; experts here are computed in turn."""
    total = 0.0
    layers, experts, _ = pairs.shape
    for layer, a, b in itertools.product(range(layers), range(experts), range(experts)):
        if a < b:
            here = [e for e in (a, b) if ExpertId(layer, e) in kept]
            away = [away_s[layer, e] for e in (a, b) if ExpertId(layer, e) not in kept]
            total += pairs[layer, a, b] * max([*away, HERE_S * len(here)])
    return total


def test_pairs_that_go_together_are_kept_together() -> None:
    """Expert 0 is asked for most, but always with another one; 2 and 3 are always asked together."""
    pairs = _pairs({(0, 0, 1): 30, (0, 0, 2): 30, (0, 2, 3): 50, (1, 0, 1): 10, (1, 1, 2): 10})
    away_s = np.full((2, 4), AWAY_S)
    assert choose_resident(pairs, away_s, HERE_S, 2) == {ExpertId(0, 2), ExpertId(0, 3)}


def test_experts_that_no_node_holds_come_first() -> None:
    pairs = _pairs({(0, 0, 1): 1000, (1, 2, 3): 1})
    away_s = np.full((2, 4), AWAY_S)
    away_s[1, 0] = away_s[0, 3] = np.inf
    assert choose_resident(pairs, away_s, HERE_S, 2) == {ExpertId(1, 0), ExpertId(0, 3)}


def test_slow_nodes_experts_are_worth_more() -> None:
    pairs = np.concatenate([_pairs({(0, a, b): 10 for a, b in itertools.combinations(range(4), 2)}, layers=1)] * 2)
    away_s = np.full((2, 4), AWAY_S)
    away_s[1] = 3 * AWAY_S
    assert choose_resident(pairs, away_s, HERE_S, 4) == {ExpertId(1, e) for e in range(4)}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 8))
def test_the_choice_equals_exhaustive_search(seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    counts = {(layer, b, a): float(rng.integers(200)) for layer in (0, 1) for a in range(4) for b in range(a)}
    pairs = _pairs(counts)
    away_s = rng.uniform(0.5, 2.0, (2, 4)) * AWAY_S
    chosen = choose_resident(pairs, away_s, HERE_S, slots)
    assert len(chosen) == slots
    # Each pair starts with half a token.
    counted = _pairs({at: n + 0.5 for at, n in counts.items()})
    every = [ExpertId(layer, e) for layer in range(2) for e in range(4)]
    best_s = min(_waited_s(counted, away_s, set(ids)) for ids in itertools.combinations(every, slots))
    assert _waited_s(counted, away_s, set(chosen)) == pytest.approx(best_s)
    assert choose_resident(pairs, away_s, HERE_S, slots, current=chosen) == chosen


def test_a_clique_is_found_among_many_experts() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 100, (2, 64, 64)).astype(float)
    # Experts 0 to 7 are asked among themselves only, and often.
    pairs[:, :8, :], pairs[:, :, :8], pairs[:, :8, :8] = 0, 0, 1e6
    chosen = choose_resident(pairs + pairs.transpose(0, 2, 1), np.full((2, 64), AWAY_S), HERE_S, 16)
    assert chosen == {ExpertId(layer, e) for layer in range(2) for e in range(8)}


def test_room_is_filled_where_nodes_are_as_fast() -> None:
    pairs = _pairs({(0, 0, 1): 10, (1, 2, 3): 30})
    away_s = np.full((2, 4), HERE_S / 2)
    assert choose_resident(pairs, away_s, HERE_S, 3) == {ExpertId(1, 2), ExpertId(1, 3), ExpertId(0, 0)}


def test_experts_are_exchanged_for_a_clear_gain_only() -> None:
    away_s = np.full((2, 4), AWAY_S)
    before = choose_resident(_pairs({(0, 0, 1): 100}), away_s, HERE_S, 2)
    little = _pairs({(0, 0, 1): 100, (1, 0, 1): 105})
    much = _pairs({(0, 0, 1): 100, (1, 0, 1): 130})
    assert choose_resident(little, away_s, HERE_S, 2, current=before) == before
    assert choose_resident(much, away_s, HERE_S, 2, current=before) == {ExpertId(1, 0), ExpertId(1, 1)}


def test_traffic_is_counted_kept_and_forgotten(tmp_path: Path) -> None:
    traffic = Traffic(DIMS)
    gate = np.array([[0.5, 0.5, 0, 0], [0, 0.9, 0, 0.1], [0, 1, 0, 0]], np.float32)
    traffic.observe(1, gate)
    assert not traffic.pairs[0].any()
    assert traffic.pairs[1].diagonal().tolist() == [1, 3, 0, 1]
    assert (traffic.pairs[1, 0, 1], traffic.pairs[1, 1, 3], traffic.pairs[1, 0, 3]) == (1, 1, 0)
    path = tmp_path / "state" / "traffic.json"
    write_traffic(traffic, path, "a" * 64)
    np.testing.assert_array_equal(read_traffic(path, DIMS, "a" * 64).pairs, traffic.pairs)
    assert not read_traffic(path, DIMS, "b" * 64).pairs.any()
    assert not read_traffic(tmp_path / "none", DIMS, "a" * 64).pairs.any()
    path.write_bytes(b"{")
    assert not read_traffic(path, DIMS, "a" * 64).pairs.any()
    many = np.tile(gate[:1], (HALVED_AT + 2, 1))
    traffic.observe(1, many)
    assert traffic.pairs[1, 0, 0] == (HALVED_AT + 3) / 2


def test_traffic_begins_with_a_latency_log(tmp_path: Path) -> None:
    path = tmp_path / "latency.csv"
    path.write_text(
        "answer,token,phase,step_tokens,layer,node,experts,tokens\n"
        "0,0,prefill,9,0,a,0 1 2,9\n"
        "0,1,decode,1,0,a,0,1\n0,1,decode,1,0,b,3,1\n0,1,decode,1,1,a,1 2,1\n"
        "0,2,decode,1,0,b,3,1\n"
    )
    traffic = traffic_of_log(path, DIMS)
    np.testing.assert_array_equal(traffic.pairs, _pairs({(0, 0, 3): 1, (1, 1, 2): 1, (0, 3, 3): 1}))
    path.write_text("a,b\n1,2\n")
    with pytest.raises(StorageError, match="of this model"):
        traffic_of_log(path, DIMS)


def _room(bundle: Path, experts: int) -> int:
    manifest = load_manifest(bundle)
    return needed_bytes(largest(manifest.experts, experts), manifest.quantisation.scheme)


def _rows(expert: int, rows: int) -> ExpertRows:
    return ExpertRows(expert, np.arange(rows, dtype=np.uint32), np.full(rows, 0.5, np.float32))


def _wait_for_changes(residents: ResidentExperts) -> frozenset[ExpertId]:
    ids = None

    def changed() -> bool:
        nonlocal ids
        ids = residents.changes()
        return ids is not None

    wait_until(changed, "experts to be loaded", poll_s=0.01)
    assert ids is not None
    return ids


def test_experts_are_exchanged_in_the_background(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = tiny_bundle("int4")
    manifest = load_manifest(bundle)
    dims = manifest.dims
    traffic = Traffic(dims)
    kept_in = tmp_path / "traffic.json"
    residents = ResidentExperts(
        bundle, manifest, budget_bytes=_room(bundle, 2), wire=WireDtype.FP32, threads=1, traffic=traffic,
        traffic_path=kept_in,
    )  # fmt: skip
    try:
        away_s = np.full((dims.layers, dims.experts), AWAY_S)
        before = {ExpertId(0, 1), ExpertId(0, 5)}
        after = {ExpertId(1, 2), ExpertId(1, 5)}
        traffic.pairs[:] = _pairs({(0, 1, 5): 100}, dims.layers, dims.experts)
        assert residents.fill(away_s, HERE_S).result(30) == before
        x = probe_input(dims.hidden, 400)
        traffic.pairs[:] = _pairs({(1, 2, 5): 1000}, dims.layers, dims.experts)
        slow = [residents.submit(0, x, [_rows(1, 400), _rows(5, 400)]) for _ in range(3)]
        residents.review(away_s, HERE_S)
        # Requests under way to experts that are to be removed are still answered.
        assert residents.changes() is None or all(future.done() for future in slow)
        alone = ExpertRuntime(bundle, manifest, before)
        for future in slow:
            output = future.result(30).output
            expected = sum(alone.run(id, x).copy() * 0.5 for id in sorted(before))
            np.testing.assert_allclose(output, expected, atol=1e-5 * float(np.abs(expected).max()))
        seen: list[frozenset[ExpertId]] = []
        while not seen or seen[-1] != after:
            seen.append(_wait_for_changes(residents))
        assert not seen[0] & before
        assert residents.ids == after
        assert residents.submit(1, x[:1], [_rows(2, 1)]).result(30).output.any()
        with pytest.raises(KeyError):
            residents.submit(0, x[:1], [_rows(1, 1)]).result(30)
    finally:
        residents.close()
    np.testing.assert_array_equal(read_traffic(kept_in, dims, manifest.model_sha256).pairs, traffic.pairs)


def test_a_budget_is_enough_for_one_and_not_more_than_there_is(tiny_bundle: Bundle) -> None:
    bundle = tiny_bundle("int4")
    manifest = load_manifest(bundle)

    def residents(budget_bytes: int) -> ResidentExperts:
        return ResidentExperts(
            bundle, manifest, budget_bytes=budget_bytes, wire=WireDtype.FP16, threads=1, traffic=Traffic(manifest.dims)
        )

    with pytest.raises(MemoryBudgetError, match="no room for a single expert"):
        residents(1 << 20)
    with pytest.raises(MemoryBudgetError, match="are available: ask for less"):
        residents(1 << 50)
    assert residents(_room(bundle, 5)).slots == 5
