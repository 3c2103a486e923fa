"""Bundles of twins without checkpoints, and what is measured on whole models of random weights."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from common.jsonl import drop_cut_line
from testbed.bench.fleet_parts import FleetParts
from testbed.evaluation.local_experts import LocalExperts
from testbed.network.uniform import write_network
from testbed.node_shares import choose_cores, holders_of, selectors_of
from testbed.twin import shapes
from testbed.twin.bundle import write_twin_bundle
from testbed.twin.shapes import CONFIGS
from testbed.whole_shape import arms
from testbed.whole_shape.arms import (
    PROFILES,
    Alone,
    Arm,
    ArmResult,
    arms_of,
    even_routing,
    predicted_ms,
    read_results,
    table,
)
from testbed.whole_shape.measure import Decoder
from tests.conftest import Run
from tests.unit.testbed.test_twin import SMALL
from wire.errors import BundleError
from wire.experts import parse_selector
from wire.manifest import Manifest, load_manifest, verify_file

ARM = Arm("mixtral-8x7b", 2, 8, 1, 100.0, 2.0, shared_air=False, sequences=1, drafts=False)
PARTS = FleetParts(
    RowCurve.line(4.0, 0.5), RowCurve((1, 8), (1.0, 1.0)), layer_ms=0.5, request_ms=0.25, byte_ms=0.0, samples=()
)
ALONE = Alone(RowCurve.line(10.0, 1.0), RowCurve.line(10.0, 1.0), PARTS)
IDLE_MS = {f"node{k}": 2.0 for k in range(8)}


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.CONFIGS, "mixtral-8x7b", {**CONFIGS["mixtral-8x7b"], **SMALL["mixtral-8x7b"]})
        yield


@pytest.fixture(scope="module")
def bundle(_small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two layers of whole experts."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    manifest, done = _write(out, 1)
    assert done == list(range(1, 17))
    assert len(manifest.experts) == 16
    return out


def _write(out: Path, slices: int, *, layers: int = 2) -> tuple[Manifest, list[int]]:
    done: list[int] = []
    manifest = write_twin_bundle(
        out, "mixtral-8x7b", layers=layers, slices=slices, seed=0, jobs=1, progress=lambda n, _: done.append(n)
    )
    return manifest, done


def _greedy(bundle: Path) -> list[list[int]]:
    model = DistributedModel(load_trunk(bundle / "trunk"), LocalExperts(bundle, threads=1), TopK(2))
    decoder = Decoder(model)
    steps = [
        row
        for arm in (msgspec.structs.replace(ARM, sequences=8), msgspec.structs.replace(ARM, drafts=True))
        for row in decoder.steps(arm, 3)
    ]
    assert [step.tokens for step in steps[:3]] == [8, 8, 8]
    replayed = arms.ACCEPTANCE[2:5]
    assert [(step.rows, step.tokens) for step in steps[3:]] == [(1 + drafted, 1 + right) for drafted, right in replayed]
    assert all(0 < step.trunk_ms <= step.total_ms for step in steps)
    return decoder.ids


def test_a_bundle_without_checkpoint_is_whole_and_computes_the_same_in_slices(bundle: Path, tmp_path: Path) -> None:
    """One number of slices after the other in the same folder: the trunk stays, greedy tokens are the same."""
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    for slices in (1, 3):
        manifest, done = _write(out, slices)
        assert len(done) == (0 if slices == 1 else 16), "what is there is not written again"
        assert len({entry.files[-1].sha256 for entry in manifest.experts}) == 16 * slices, "all experts differ"
        for file in (*manifest.trunk, *(file for entry in manifest.experts for file in entry.files)):
            verify_file(out, file)
        assert len([*(out / "experts").rglob("*.weights")]) == 16 * slices
    trunk = "trunk/model.safetensors"
    assert (bundle / trunk).stat().st_mtime_ns == (out / trunk).stat().st_mtime_ns
    assert _greedy(out) == _greedy(bundle)
    with pytest.raises(BundleError, match="holds another bundle"):
        _write(out, 3, layers=1)


def test_a_bundle_of_drawn_weights_has_no_output_error_to_show(bundle: Path, run: Run) -> None:
    shown = run("exporter", "inspect", bundle)
    assert shown.returncode == 0, shown.stderr
    assert "int4 b32" in shown.stdout
    assert "output error" not in shown.stdout


def test_routing_of_random_weights_is_about_even(bundle: Path) -> None:
    trunk = load_trunk(bundle / "trunk")
    asked: Counter[int] = Counter()

    class Counting(LocalExperts):
        def begin(self, layer, hidden, gate):  # type: ignore[no-untyped-def]
            asked.update(np.nonzero(gate)[1].tolist())
            return super().begin(layer, hidden, gate)

    decoder = Decoder(DistributedModel(trunk, Counting(bundle, threads=1), TopK(2)))
    list(decoder.steps(msgspec.structs.replace(ARM, sequences=8), 30))
    assert len(asked) == 8
    assert max(asked.values()) < 0.35 * asked.total()


def test_the_routing_of_steps_is_recorded(bundle: Path) -> None:
    trunk = load_trunk(bundle / "trunk")
    gates: list[np.ndarray] = []

    class Watching(LocalExperts):
        def begin(self, layer, hidden, gate):  # type: ignore[no-untyped-def]
            gates.append(gate)
            return super().begin(layer, hidden, gate)

    decoder = Decoder(DistributedModel(trunk, Watching(bundle, threads=1), TopK(2)))
    gates.clear()
    recorded = decoder.routing(2)
    assert {rows: found.shape for rows, found in recorded.items()} == {n: (12, 2, n, 2) for n in (1, 4, 8)} | {
        5: (12, 2, 5, 2), 6: (24, 2, 6, 2)
    }  # fmt: skip
    for layer in range(2):
        asked = np.zeros((1, 8), bool)
        asked[0, recorded[1][0, layer, 0]] = True
        np.testing.assert_array_equal(asked, gates[layer] > 0)


def test_nodes_hold_everything_once_and_slices_meet_rarely(bundle: Path) -> None:
    for experts, slices in ((8, 1), (8, 2), (8, 4), (8, 8), (128, 1), (128, 4)):
        holders = holders_of(experts, slices, 8)
        assert set(Counter(holders).values()) == {experts * slices // 8}
        for expert in range(experts):
            assert len(set(holders[expert * slices : (expert + 1) * slices])) == slices
    manifest = load_manifest(bundle)
    selectors = selectors_of(manifest.dims, 8)
    held = [unit for text in selectors.values() for unit in parse_selector(text, layers=2, experts=8)]
    assert sorted(held) == sorted(entry.id for entry in manifest.experts)


def test_nodes_get_physical_cores_first() -> None:
    pairs = [[core, core + 8] for core in range(8)]
    assert choose_cores(pairs, 8).nodes == list(range(8))
    assert choose_cores(pairs, 8).station == list(range(8, 16))
    few = choose_cores([[0], [1]], 8)
    assert (few.station, few.nodes) == ([0, 1], [0, 1, 0, 1, 0, 1, 0, 1])


def test_every_arm_has_its_links(tmp_path: Path) -> None:
    from testbed.network.spec import read_spec

    write_network(tmp_path / "network.yaml", "shape", ["node0", "node1"], PROFILES)
    profiles = read_spec(tmp_path / "network.yaml").profiles
    for arm in arms_of("mixtral-8x7b", 2, 8, 4):
        profile = profiles[arm.profile]
        assert (profile.shared_air, profile.default.down_mbps) == (arm.shared_air, arm.mbps)
        assert 2 * profile.default.delay_ms == arm.rtt_ms


def test_predictions_follow_links_and_batches(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    routing = even_routing(manifest, {})
    near = predicted_ms(ARM, manifest, ALONE, IDLE_MS, routing)
    # trunk, and in each layer: overhead, two requests, round trip, a unit, and less than a millisecond of transfer
    assert 10 + 2 * (0.5 + 0.5 + 2 + 4) < near < 10 + 2 * (0.5 + 0.5 + 2 + 4) + 2
    far = predicted_ms(ARM, manifest, ALONE, dict.fromkeys(IDLE_MS, 5.0), routing)
    assert far == pytest.approx(near + 2 * 3)
    assert predicted_ms(msgspec.structs.replace(ARM, sequences=8), manifest, ALONE, IDLE_MS, routing) < near
    assert predicted_ms(msgspec.structs.replace(ARM, drafts=True), manifest, ALONE, IDLE_MS, routing) < near
    crowded = msgspec.structs.replace(PARTS, crowd=RowCurve((1, 2), (1.0, 1.5)))
    slower = predicted_ms(ARM, manifest, msgspec.structs.replace(ALONE, fleet=crowded), IDLE_MS, routing)
    assert slower == pytest.approx(near + 2 * 0.5 * 4), "a token asks two of eight nodes"
    batch = msgspec.structs.replace(ARM, sequences=8)
    alike = even_routing(manifest, {8: np.tile(np.arange(2), (1, 2, 8, 1))})
    # All eight rows ask the same two experts: each node computes eight rows, where others would share them.
    step_ms = 8 * predicted_ms(batch, manifest, ALONE, IDLE_MS, alike)
    assert 17 + 2 * (1 + 2 + 7.5) < step_ms < 17 + 2 * (1 + 2 + 7.5) + 2


def test_finished_arms_are_kept_and_tabled(tmp_path: Path) -> None:
    step = {"rows": 1, "tokens": 1, "total_ms": 20.0, "trunk_ms": 5.0, "network_ms": 5.0, "compute_ms": 8.0,
            "wait_ms": 1.0, "framing_ms": 1.0, "requests": 4}  # fmt: skip
    log = tmp_path / "samples.jsonl"
    lines = [
        msgspec.json.encode(
            {"arm": msgspec.structs.replace(ARM, slices=slices), "steps": [{**step, "total_ms": 20.0 / slices}] * 3,
             "predicted_ms": 10.0, "alone": ALONE, "idle_ms": IDLE_MS, "unix_s": 1}
        )
        for slices in (1, 4)
    ]  # fmt: skip
    log.write_bytes(b"\n".join(lines) + b"\n" + lines[0][:30])
    drop_cut_line(log)
    results = read_results(log)
    assert set(results) == {ARM, msgspec.structs.replace(ARM, slices=4)}
    assert isinstance(results[ARM], ArmResult)
    text = "\n".join(table(list(results.values())))
    assert "| mixtral-8x7b, 2, 8 | 4 | dedicated-100-2 | batch 1 | 5.0 | 200.00 | 10.0 | 0.50 | 4.00 |" in text
    assert "| mixtral-8x7b, 1, dedicated-100-2, batch 1 | 5.0 | 5.0 | 8.0 | 1.0 | 1.0 | 20.0 | 2.0 |" in text


def test_what_the_model_does_not_have_is_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.bench.system.why_not", lambda: "")
    many = run("testbed", "whole-shape", "mixtral-8x7b", tmp_path / "out", "--layers", 33)
    assert (many.returncode, "has 32 layers, not 33" in many.stderr) == (2, True)
