"""Plans of which device holds which experts, and the command that makes them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.errors import PlacementError
from bs_coordinator.placement.spread import Placement, PlacementDevice, plan_placement
from tests.in_process import run_in_process as run
from wire.experts import ExpertId
from wire.tensors import Array

LAYERS, EXPERTS = 3, 8


def _copies(placement: Placement) -> Counter[ExpertId]:
    return Counter(id for ids in placement.experts.values() for id in ids)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(3, 6))
def test_every_expert_has_its_copies_on_different_devices(seed: int, replicas: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    traffic: Array = rng.random((LAYERS, EXPERTS), np.float32)
    room = -(-replicas * LAYERS * EXPERTS // count) + LAYERS * EXPERTS // 2
    devices = [PlacementDevice(f"d{k}", min(room, LAYERS * EXPERTS), float(rng.uniform(1, 20))) for k in range(count)]
    placement = plan_placement(devices, traffic, replicas)
    assert set(_copies(placement).values()) == {replicas}
    assert len(_copies(placement)) == LAYERS * EXPERTS
    assert all(len(placement.experts[d.name]) <= d.experts for d in devices)
    assert sum(placement.load.values()) == pytest.approx(1.0)


def test_slices_of_an_expert_are_spread_over_devices() -> None:
    devices = [PlacementDevice(f"d{k}", 2 * LAYERS * EXPERTS) for k in range(4)]
    placement = plan_placement(devices, np.ones((LAYERS, EXPERTS), np.float32), 2, slices=4)
    assert set(_copies(placement).values()) == {2}
    assert len(_copies(placement)) == 4 * LAYERS * EXPERTS
    held = {name: {(layer, unit // 4) for layer, unit in ids} for name, ids in placement.experts.items()}
    assert all(len(experts) == LAYERS * EXPERTS for experts in held.values())  # each device has a part of each expert
    with pytest.raises(PlacementError, match="96 slices × 2 copies do not fit"):
        plan_placement(devices[:2], np.ones((LAYERS, EXPERTS), np.float32), 2, slices=4)


def test_a_slow_device_gets_less_traffic() -> None:
    devices = [PlacementDevice("fast", 100, 5.0), PlacementDevice("slow", 100, 15.0)]
    load = plan_placement(devices, np.ones((LAYERS, EXPERTS), np.float32), 1).load
    assert load["fast"] == pytest.approx(0.75)


def test_a_placement_is_kept_for_small_changes_and_left_for_large_ones() -> None:
    traffic = np.ones((LAYERS, EXPERTS), np.float32)
    first = plan_placement([PlacementDevice("a", 100, 10.0), PlacementDevice("b", 100, 10.0)], traffic, 1)
    little = plan_placement(
        [PlacementDevice("a", 100, 10.0), PlacementDevice("b", 100, 10.5)], traffic, 1, current=first.experts
    )
    assert little.experts == first.experts
    much = plan_placement(
        [PlacementDevice("a", 100, 10.0), PlacementDevice("b", 100, 30.0)], traffic, 1, current=first.experts
    )
    assert len(much.experts["b"]) < len(first.experts["b"])


def test_what_does_not_fit_is_said() -> None:
    traffic = np.ones((LAYERS, EXPERTS), np.float32)
    with pytest.raises(PlacementError, match="24 experts × 2 copies do not fit: all devices together hold 40"):
        plan_placement([PlacementDevice("a", 20), PlacementDevice("b", 20)], traffic, 2)
    with pytest.raises(PlacementError, match="need as many devices, there are 1"):
        plan_placement([PlacementDevice("a", 100)], traffic, 2)


def test_the_command(random_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "latency.csv"
    log.write_text("layer,experts,tokens\n0,3,100\n1,0 1,7\n")
    out = tmp_path / "placement.json"
    command = (
        "bs_coordinator", "place", "--bundle", random_bundle, "--node", "pi1=1G,10", "--node", "pi2=1G,12",
        "--node", "jetson=2G,4", "--traffic", log, "--out", out,
    )  # fmt: skip
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(out.read_text())) == {"pi1", "pi2", "jetson"}
    assert "wdmoe-node --id jetson --experts '" in done.stdout
    again = run(*command, "--keep", out)
    assert "16 copies stay where they are, 0 are new" in again.stderr
    assert run(*command, "--node", "pi3=lots").returncode == 2
    log.write_text("layer,tokens\n1,2\n")
    wrong = run(*command)
    assert wrong.returncode == 12
    assert "is not a latency.csv of this model" in wrong.stderr
