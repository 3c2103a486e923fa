"""The radio simulation against formulas worked out by hand, and from trace to table through its commands."""

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from bs_coordinator.selection import TopK, parse_policy
from testbed.cli import cli
from testbed.errors import SimulationError
from testbed.radio import npz_file
from testbed.radio.replay import ALLOCATIONS, batch_seconds, batches, replay
from testbed.radio.results import compare_accuracy, compare_latency
from testbed.radio.sensitivity import sweep
from testbed.radio.setting import Cell, RadioDevice, Setting, expert_flops, read_setting
from testbed.radio.traces import PromptRouting, RoutingTrace, TraceFacts, read_trace, write_trace

FACTS = TraceFacts(
    model_sha256="0" * 64,
    quantisation="int8 b32",
    hidden=576,
    intermediate=1536,
    top_k=2,
    data_sha256={},
    commit="unknown",
)


def some_trace(prompts: int = 6, tokens: int = 20, layers: int = 3, seed: int = 0) -> RoutingTrace:
    """Gates as flat as the demo model's."""
    logits = np.random.default_rng(seed).normal(scale=0.6, size=(prompts, tokens, layers, 8))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return RoutingTrace([PromptRouting(scores) for scores in probabilities.astype(np.float32)], FACTS)


def cell(setting: Setting | None = None, draws: int = 50) -> Cell:
    return Cell(setting or Setting(), hidden=576, intermediate=1536, draws=draws, seed=1)


def test_link_budget_by_hand() -> None:
    """One device at 100 m without fading: -83.28 dB of path loss at 3.5 GHz, Shannon's rate both ways."""
    setting = Setting(devices=(RadioDevice(60, 80, 1e12),), fading="none", bandwidth_hz=20e6)
    assert 10 * np.log10(setting.path_gain()) == pytest.approx(-(32.4 + 10.881 + 40), abs=1e-3)
    one = Cell(setting, hidden=576, intermediate=1536, draws=1, seed=0)
    noise_dbm = -174 + 10 * np.log10(20e6)
    down_snr = 10 ** ((40 - 83.281 - noise_dbm) / 10)
    up_snr = 10 ** ((23.0103 - 83.281 - noise_dbm) / 10)
    expected_s = 9216 / (20e6 * np.log2(1 + down_snr)) + 9216 / (20e6 * np.log2(1 + up_snr))
    forecast = one.forecast(0, 5)
    assert forecast.row_air_s[0] == pytest.approx(expected_s, rel=1e-4)
    assert forecast.row_compute_s[0] == pytest.approx(expert_flops(576, 1536) / 1e12)
    assert forecast.layer == 5


def test_expert_operations() -> None:
    assert expert_flops(4096, 14336) == 2 * 3 * 4096 * 14336 + 8 * 14336


def test_rayleigh_fading_has_the_path_loss_as_its_mean() -> None:
    many = cell(draws=20_000)
    still = cell(Setting(fading="none"), draws=1)
    assert many.links.down_hz.mean(axis=0) == pytest.approx(still.links.down_hz[0], rel=0.03)
    assert many.links.up_hz.mean(axis=0) == pytest.approx(still.links.up_hz[0], rel=0.03)


def test_vanilla_latency_by_hand() -> None:
    """Top-2 with equal shares: count rows per expert, multiply, take the slowest, add up layers."""
    trace, radio = some_trace(), cell(draws=6)
    sent = batches(trace, "prefill", 6, seed=0)
    rows = replay(parse_policy("topk", top_k=2), sent, radio, top_k=2)
    got_s = batch_seconds(radio, rows, "uniform")
    for draw, batch in enumerate(sent):
        expected_s = 0.0
        for layer in range(trace.layers):
            best = np.argsort(-batch.scores[:, layer], axis=1)[:, :2]
            count = np.bincount(best.ravel(), minlength=8)
            row_s = radio.forecast(draw, layer).one_row_s
            expected_s += (count * row_s).max()
        assert got_s[draw] == pytest.approx(expected_s)


def test_decode_sends_one_token_of_each_prompt() -> None:
    trace = some_trace()
    sent = batches(trace, "decode", 12, seed=3)
    assert [batch.scores.shape for batch in sent] == [(1, 3, 8)] * 12
    assert all((trace.prompts[i % 6].scores == batch.scores).all(axis=(1, 2)).any() for i, batch in enumerate(sent))
    assert all((a.scores == b.scores).all() for a, b in zip(sent, batches(trace, "decode", 12, seed=3), strict=True))


def test_better_allocations_are_faster_on_every_draw() -> None:
    radio = cell(Setting(loss_exponent=3.19))
    rows = replay(parse_policy("wdmoe", top_k=2), batches(some_trace(), "prefill", 50, seed=0), radio, top_k=2)
    uniform_s, optimal_s, layer_s = (batch_seconds(radio, rows, allocation) for allocation in ALLOCATIONS)
    assert (optimal_s <= uniform_s * (1 + 1e-6)).all()
    assert (layer_s <= optimal_s * (1 + 1e-6)).all()


def test_table_has_the_papers_order() -> None:
    rows = compare_latency(some_trace(), cell(), ["topk", "wdmoe"], seed=0)
    by_arm = {(row.policy, row.allocation): row for row in rows if row.phase == "prefill"}
    vanilla, both = by_arm["topk", "uniform"], by_arm["wdmoe", "optimal"]
    assert vanilla.saved.value == 0
    assert vanilla.dropped == 0
    assert both.dropped > 0
    for single in (by_arm["topk", "optimal"], by_arm["wdmoe", "uniform"]):
        assert vanilla.mean_ms.value > single.mean_ms.value > both.mean_ms.value
    for row in by_arm.values():
        assert row.mean_ms.low is not None
        assert row.mean_ms.high is not None
        assert row.mean_ms.low <= row.mean_ms.value <= row.mean_ms.high
        assert row.saved.value == pytest.approx(1 - row.mean_ms.value / vanilla.mean_ms.value)


def test_sweep_drops_more_at_higher_thresholds() -> None:
    points = list(sweep(some_trace(), cell(draws=10), seed=0, thetas=(0.0, 0.9, 1.0), gains=(1.0,)))
    assert [(p.theta, p.gain) for p in points] == [(t, g) for g in (1.0, None) for t in (0.0, 0.9, 1.0)]
    fixed = [p.latencies[0].dropped for p in points if p.gain is None]
    assert fixed[0] == 0
    assert 0 < fixed[1] < 0.5
    assert fixed[2] == pytest.approx(0.5)


def test_accuracy_is_compared_item_by_item() -> None:
    vanilla, other = np.arange(100) < 60, np.arange(100) < 57
    rows = compare_accuracy(
        {"topk": {"PIQA": vanilla}, "wdmoe": {"PIQA": other}}, {"topk": 2.0, "wdmoe": 1.5}, top_k=2, seed=0
    )
    assert [row.right.value for row in rows] == pytest.approx([60, 57])
    assert rows[1].lost.value == pytest.approx(3)
    assert rows[1].lost.low is not None
    assert -2 <= rows[1].lost.low <= 0  # three lost of none gained may be chance; unpaired, it would reach to −11
    assert rows[1].dropped == pytest.approx(0.25)


def test_trace_survives_its_file(tmp_path: Path) -> None:
    scores = [prompt.scores[: 3 + i] for i, prompt in enumerate(some_trace().prompts)]
    for prompts in ([PromptRouting(s) for s in scores], [PromptRouting(s, s - 0.5) for s in scores]):
        write_trace(RoutingTrace(prompts, FACTS), tmp_path / "trace.npz")
        again = read_trace(tmp_path / "trace.npz")
        assert again.facts == FACTS
        assert [p.scores.tolist() for p in again.prompts] == [p.scores.tolist() for p in prompts]
        assert [p.order if p.order is None else p.order.tolist() for p in again.prompts] == [
            p.order if p.order is None else p.order.tolist() for p in prompts
        ]


def test_a_bias_decides_which_experts_get_the_rows() -> None:
    """A model that chooses by scores plus a bias: its favourites are asked, weighed by their small scores."""
    plain, radio = some_trace(), cell(draws=6)
    bias = np.zeros(8, np.float32)
    bias[[2, 5]] = 10
    trace = RoutingTrace([PromptRouting(p.scores, p.scores + bias) for p in plain.prompts], FACTS)
    sent = batches(trace, "prefill", 6, seed=0)
    rows = replay(parse_policy("topk", top_k=2), sent, radio, top_k=2)
    assert (rows == 20 * (bias > 0)).all()
    one = replay(parse_policy("topk", top_k=2), batches(trace, "decode", 6, seed=0), radio, top_k=2)
    assert (one == (bias > 0)).all()
    layer = sent[0].layer(1, 2)
    np.testing.assert_allclose(layer.weights.sum(axis=1), 1, rtol=1e-6)
    scores = sent[0].scores[:, 1]
    np.testing.assert_allclose(layer.weights[:, 2] / layer.weights[:, 5], scores[:, 2] / scores[:, 5], rtol=1e-5)


def _arrays(**changed: Any) -> dict[str, Any]:
    facts = np.frombuffer(msgspec.json.encode(FACTS), np.uint8)
    return {"probabilities": np.ones((4, 2, 8), np.float32), "tokens": np.array([4]), "facts": facts} | changed


def _facts(**changed: Any) -> np.ndarray:
    return np.frombuffer(msgspec.json.encode(msgspec.structs.replace(FACTS, **changed)), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (_arrays(tokens=np.array([3])), "don't add up to its 4 rows"),
        (_arrays(tokens=np.array([], np.int64)), "don't add up"),
        (_arrays(tokens=np.array([2**62, 2**62, 2**62, 2**62, 4])), "don't add up"),
        (_arrays(tokens=np.array([-1, 5])), "don't add up"),
        (_arrays(tokens=np.array([4, 0])), "a prompt of no tokens"),
        (_arrays(tokens=np.array([4.0])), "'tokens' is float64"),
        (_arrays(tokens=np.array(4)), "expected int64 with 1 dimensions"),
        (_arrays(probabilities=np.ones((4, 8), np.float32)), "expected float32 with 3 dimensions"),
        (_arrays(probabilities=np.ones((4, 2, 8))), "is float64"),
        (_arrays(probabilities=np.ones((4, 2, 8), ">f4")), "is >f4"),
        (_arrays(probabilities=np.ones((4, 0, 8), np.float32)), "4 rows of 0 layers"),
        (_arrays(probabilities=np.ones((4, 2, 0), np.float32)), "2 experts per token, of 0"),
        (_arrays(probabilities=np.full((4, 2, 8), np.nan, np.float32)), "negative, absurdly large or not a number"),
        (_arrays(probabilities=np.full((4, 2, 8), -0.1, np.float32)), "negative, absurdly large"),
        (_arrays(probabilities=np.full((4, 2, 8), 3e38, np.float32)), "negative, absurdly large"),
        (_arrays(probabilities=np.zeros((4, 2, 8), np.float32)), "all zero"),
        (_arrays(probabilities=np.array([{}], object)), "'probabilities' is object"),
        (_arrays(facts=np.frombuffer(b"{}", np.uint8)), "missing required field"),
        (_arrays(facts=np.frombuffer(b"[" * 100_000, np.uint8)), "nested too deeply"),
        (_arrays(facts=_facts(top_k=9)), "9 experts per token, of 8"),
        (_arrays(facts=_facts(hidden=2**62)), "impossible dimensions"),
        (_arrays(facts=_facts(intermediate=-1)), "impossible dimensions"),
        (_arrays(order=np.ones((4, 2, 7), np.float32)), r"'order' is \[4, 2, 7\], but 'probabilities' \[4, 2, 8\]"),
        (_arrays(order=np.ones((4, 2, 8))), "'order' is float64"),
        (_arrays(order=np.full((4, 2, 8), -np.inf, np.float32)), "'order' has a value that is absurdly large"),
        ({"tokens": np.array([4])}, "no array 'probabilities'"),
    ],
)
def test_files_that_are_not_traces_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    np.savez(tmp_path / "trace.npz", allow_pickle=True, **arrays)
    with pytest.raises(SimulationError, match=f"is not a routing trace: .*{reason}") as raised:
        read_trace(tmp_path / "trace.npz")
    assert "\n" not in str(raised.value)


def _npy(header: str, data: bytes = b"") -> bytes:
    raw = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data


def _npz(path: Path, probabilities: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    np.savez(path, allow_pickle=True, **_arrays())
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()} | {"probabilities.npy": probabilities}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 2, 8), }", "the file has 256"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -2, 8), }", r"is float32 \[-4, -2, 8\]"),
        ("{'descr': '<f4', 'fortran_order': True, 'shape': (4, 2, 8), }", "expected float32 with 3"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (4, 2, 8), }", "is object"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4, 2, 8), }", "is .*'a'"),
        ("{'descr': 7, 'fortran_order': False, 'shape': (4, 2, 8), }", "no valid header"),
        ("{'descr': '<f4', 'shape': (4, 2, 8), }", "no valid header"),
        ("[" * 9000, "no valid header"),
        ("__import__('os')", "no valid header"),
    ],
)
def test_array_headers_are_checked_before_memory_is_allocated(tmp_path: Path, header: str, reason: str) -> None:
    path = _npz(tmp_path / "trace.npz", _npy(header, bytes(256)))
    with pytest.raises(SimulationError, match=f"is not a routing trace: .*{reason}") as raised:
        read_trace(path)
    assert "\n" not in str(raised.value)


def test_a_small_file_that_unpacks_to_more_than_memory_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 1 << 14
    data = _npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 8, 8), }}", bytes(rows * 256))
    path = _npz(tmp_path / "trace.npz", data)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(npz_file, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(np, "frombuffer", None)
    with pytest.raises(SimulationError, match=r"claims the shape \[16384, 8, 8\], too large for a trace"):
        read_trace(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_random_damage_to_traces_is_one_line(tmp_path: Path, compression: int) -> None:
    shape = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2, 8), }"
    path = _npz(tmp_path / "trace.npz", _npy(shape, np.ones(64, "<f4").tobytes()), compression)
    if compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(SimulationError, match="compressed in another way"):
            read_trace(path)
        return
    assert read_trace(path).experts == 8
    whole = path.read_bytes()
    source = np.random.default_rng(3)
    for _ in range(150):
        data = bytearray(whole)
        for at in source.integers(len(data), size=source.choice([1, 3, 20])):
            data[at] = source.integers(256)
        path.write_bytes(bytes(data[: source.choice([len(data), int(source.integers(len(data)))])]))
        with contextlib.suppress(SimulationError):
            read_trace(path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.npz").write_text("no archive")
    with pytest.raises(SimulationError, match="is not a routing trace"):
        read_trace(tmp_path / "trace.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(SimulationError, match="is not a routing trace"):
        read_trace(tmp_path / "array.npy")
    with pytest.raises(SimulationError, match="No such file"):
        read_trace(tmp_path / "none.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(SimulationError, match="not a plain file"):
        read_trace(tmp_path / "pipe.npz")


def test_setting_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "setting.yaml"
    path.write_text("loss_exponent: 3.19\ndevices:\n- {x_m: 3, y_m: 4, flops: 1.0e+9}\n")
    setting = read_setting(path)
    assert setting == Setting(loss_exponent=3.19, devices=(RadioDevice(3, 4, 1e9),))
    assert setting.devices[0].distance_m == 5
    impossible = (
        "noise_dbm_hz: 1.0e+9",
        "loss_1m_db: -1.0e+9",
        "loss_exponent: 99",
        "devices: [{x_m: 1.0e+300, y_m: 0, flops: 1}]",
    )
    for wrong in ("bandwidth_hz: -1", "colour: red", "devices: []", "- 1", "a: [", "fading: rice", *impossible):
        path.write_text(wrong)
        with pytest.raises(SimulationError, match=r"setting\.yaml"):
            read_setting(path)


def test_another_number_of_devices_is_refused() -> None:
    radio = cell(Setting(devices=(RadioDevice(1, 1, 1e9),)))
    with pytest.raises(SimulationError, match="1 devices, the model 8 experts"):
        replay(TopK(2), some_trace().prompts, radio, top_k=2)


def test_simulate_command(tmp_path: Path) -> None:
    write_trace(some_trace(), tmp_path / "trace.npz")
    arguments = ["simulate", str(tmp_path / "trace.npz"), "--draws", "20", "--seed", "7", "--out"]
    for folder in ("one", "two"):
        result = CliRunner().invoke(cli, [*arguments, str(tmp_path / folder)], catch_exceptions=False)
        assert result.exit_code == 0
        assert "| wdmoe | optimal |" in result.output
    one, two = (json.loads((tmp_path / folder / "simulation.json").read_bytes()) for folder in ("one", "two"))
    assert one["latency"] == two["latency"]
    assert len(one["latency"]) == 2 * 2 * 3
    assert one["seed"] == 7
    assert one["setting"]["carrier_ghz"] == 3.5
    assert one["trace"]["tokens"] == 120
    assert (tmp_path / "one" / "simulation.md").read_text() == (tmp_path / "two" / "simulation.md").read_text()
    assert (tmp_path / "one" / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "one" / "latency.csv").read_text().splitlines()) == 13


def test_simulate_reports_what_is_wrong(tmp_path: Path) -> None:
    write_trace(some_trace(), tmp_path / "trace.npz")
    result = CliRunner().invoke(cli, ["simulate", str(tmp_path / "trace.npz"), "--policy", "wdmo"])
    assert isinstance(result.exception, SimulationError)
    assert "policy 'wdmo' is unknown" in str(result.exception)
