"""Predictions and plans of whole fleets: formulas, choices, refusals and the command on paper."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.errors import FleetTooSmallError
from bs_coordinator.placement.boards import BROKER_S, KINDS, Board, BoardKind, BoardLink
from bs_coordinator.placement.fleet_plan import FleetPlan, Wanted
from bs_coordinator.placement.known_fleet import predict_known
from bs_coordinator.placement.plan import plan_fleet
from bs_coordinator.placement.predict import (
    BYTE_S,
    LAYER_S,
    LOCAL,
    REQUEST_S,
    Costs,
    Routing,
    Station,
    predict_prompt_s,
    predict_step,
)  # fmt: skip
from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.placement.shapes import NAMED, ModelShape, possible_slices, shape_of_config, variant
from edge_node.experts import needed_bytes
from exporter.expert.graph import plan_layout
from testbed.bench.random_experts import manifest_of
from testbed.twin.shapes import CONFIGS
from tests.in_process import run_in_process as run
from wire.frames import HEADER_BYTES, RESULT_BYTES, ROW_BYTES
from wire.manifest import Dims, ExpertEntry, FileEntry, Quantisation

INT4 = Quantisation(scheme="int4", block=32)
SMALL = ModelShape("small", hidden=1024, intermediate=2048, layers=2, experts=4, top_k=2, trunk_bytes=10**7)
PLAIN = BoardKind(2**30, 10e9, 100e9, 1.0, "a test")
STATION = Station(RowCurve.line(10e-3, 1e-3))
WANTED = Wanted(quantisations=(INT4,), station=STATION)


def board(name: str, *, mbps: float = 100, rtt_ms: float = 2, ram: int = 2**30, kind: str = "plain") -> Board:
    return Board(name=name, kind=kind, facts=PLAIN, ram_bytes=ram, link=BoardLink(1e-3 * rtt_ms, mbps, mbps))


def even(shape: ModelShape) -> Routing:
    return Routing(np.ones((shape.layers, shape.experts), np.float32), shape.top_k)


@pytest.mark.parametrize("shared_air", [False, True])
def test_a_step_is_the_formula(shared_air: bool) -> None:
    """All of two experts are asked, so nothing is drawn: device a holds expert 0, device b expert 1."""
    shape = SMALL._replace(experts=2)
    rate = RowCurve((1, 2, 4), (1 / 1e9, 1 / 1e9 + 1 / 5e9, 1 / 1e9 + 3 / 5e9))
    fast = replace(board("a", mbps=80, rtt_ms=2), byte_s={str(INT4): rate}, node_s=1e-3)
    slow = replace(board("b", mbps=40, rtt_ms=6), byte_s={str(INT4): rate}, node_s=2e-3)
    whole = variant(shape, INT4, 1)
    costs = Costs(shape, whole, [fast, slow], shared_air)
    holders = np.array([[0, 1], [0, 1]])
    rows = 3
    step = predict_step(costs, holders, even(shape), rows, STATION)
    size = whole.unit_bytes
    compute_s = size / 1e9 + 2 * size / 5e9
    air_bytes = (100 + HEADER_BYTES + rows * (2048 + ROW_BYTES)) + (100 + RESULT_BYTES + rows * 2048)
    a_air, b_air = air_bytes / 10e6, air_bytes / 5e6
    a_rest, b_rest = 3e-3 + compute_s, 8e-3 + compute_s
    layer_s = a_air + b_air + b_rest if shared_air else max(a_air + a_rest, b_air + b_rest)
    station_s = LAYER_S + 2 * REQUEST_S + 2 * air_bytes * BYTE_S
    assert step.seconds == pytest.approx(10e-3 + 2 * 1e-3 + 2 * (layer_s + station_s))
    assert step.asked == 2
    assert step.read_bytes == size


def test_a_fleet_in_slices_is_predicted_from_its_selectors() -> None:
    """Both halves of both experts that a token asks are on two nodes: each computes two units."""
    dims = Dims(hidden=64, intermediate=64, layers=3, experts=2, top_k=2, vocab=8, max_positions=8, slices=2)
    file = FileEntry(path="w", bytes=1000, sha256="0" * 64)
    entries = [
        ExpertEntry(layer=layer, expert=expert, files=(file,), probe_output="", error=0.0, source_sha256="0" * 64,
                    slice=part, slices=2)
        for layer in range(3) for expert in range(2) for part in range(2)
    ]  # fmt: skip
    link = BoardLink(4e-3, 80, 80)
    step = predict_known(
        manifest_of(entries, dims, INT4), {"a": "L*:E*/0", "b": "L*:E*/1"}, {"a": link, "b": link},
        unit_s=RowCurve.line(3e-3, 1e-3), station=Station(RowCurve.line(5e-3, 0.0)), shared_air=False, node_s=1e-3,
        routing=Routing(np.ones((3, 2), np.float32), 2), crowd=RowCurve((1, 2), (1.0, 1.5)),
    )  # fmt: skip
    sent = 200 + HEADER_BYTES + RESULT_BYTES + 2 * 128 + 2 * ROW_BYTES
    station_s = LAYER_S + 2 * REQUEST_S + 2 * sent * BYTE_S
    assert step.seconds == pytest.approx(5e-3 + 3 * (5e-3 + 2 * 1.5 * 3e-3 + sent / 10e6 + station_s))


def test_experts_of_the_base_station_cost_no_message() -> None:
    shape = SMALL._replace(experts=2)
    costs = Costs(shape, variant(shape, INT4, 1), [board("a")], False)
    station = STATION._replace(unit_s=RowCurve.line(4e-3, 1e-3))
    step = predict_step(costs, np.full((2, 2), LOCAL), even(shape), 1, station)
    assert step.seconds == pytest.approx(10e-3 + 2 * 2 * 4e-3)
    assert (step.asked, step.air_s) == (0, 0)


def test_a_prompt_takes_what_its_bottleneck_takes() -> None:
    shape = SMALL._replace(experts=2)
    costs = Costs(shape, variant(shape, INT4, 1), [board("a", mbps=1), board("b", mbps=1)], False)
    holders = np.array([[0, 1], [0, 1]])
    routing = even(shape)
    one = predict_step(costs, holders, routing, 128, STATION)
    assert predict_prompt_s(costs, holders, routing, 128, STATION) == pytest.approx(one.seconds)
    four_s = predict_prompt_s(costs, holders, routing, 512, STATION)
    air_s = one.busiest_s  # 128 rows at 1 Mbit/s take far longer than anything else
    assert four_s == pytest.approx(4 * 2 * air_s + one.seconds / 2 - air_s)
    assert one.seconds < four_s < 4 * one.seconds


def test_times_between_and_beyond_what_was_measured() -> None:
    curve = RowCurve((1, 4, 8), (10.0, 16.0, 20.0))
    assert curve.at([1, 2.5, 4, 6, 8, 12]) == pytest.approx([10, 13, 16, 18, 20, 24])
    assert RowCurve((1,), (3.0,)).at([1, 100]) == pytest.approx([3, 3])
    assert (curve.first, curve.scaled(0.5).first) == (10, 5)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans(), st.sampled_from([1, 5]), st.floats(1, 10),
    st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_faster_links_are_never_predicted_slower(
    seed: int, count: int, shared_air: bool, rows: int, factor: float, slices: int
) -> None:
    rng = np.random.default_rng(seed)
    boards = [board(f"b{k}", mbps=rng.uniform(1, 100), rtt_ms=rng.uniform(0, 20)) for k in range(count)]
    holders = rng.integers(LOCAL, count, (SMALL.layers, SMALL.experts * slices))
    routing = Routing(rng.uniform(0.1, 9, (SMALL.layers, SMALL.experts)).astype(np.float32), SMALL.top_k)
    changed = int(rng.integers(count))
    link = boards[changed].link
    faster = list(boards)
    faster[changed] = replace(boards[changed], link=BoardLink(link.rtt_s, link.down_mbps * factor, link.up_mbps))
    cut = variant(SMALL, INT4, slices)
    before, after = (
        predict_step(Costs(SMALL, cut, some, shared_air), holders, routing, rows, STATION).seconds
        for some in (boards, faster)
    )
    assert after <= before * (1 + 1e-12)


def _plan(boards: list[Board], wanted: Wanted = WANTED) -> FleetPlan | None:
    try:
        return plan_fleet(SMALL, boards, even(SMALL), wanted)
    except FleetTooSmallError:
        return None


@given(st.lists(st.integers(0, 40 << 20), min_size=1, max_size=4), st.integers(0, 40 << 20), st.integers(1, 3))
def test_memory_is_never_exceeded_and_more_memory_is_never_worse(rams: list[int], more: int, replicas: int) -> None:
    wanted = replace(WANTED, replicas=replicas)
    boards = [board(f"b{k}", ram=ram) for k, ram in enumerate(rams)]
    plan = _plan(boards, wanted)
    if plan is not None:
        assert all(one.ram_bytes <= one.ram_limit_bytes and one.units <= one.fits for one in plan.boards)
        assert 1 <= plan.replicas <= replicas
        held = sum(one.units for one in plan.boards)
        assert held == plan.replicas * SMALL.layers * SMALL.experts * plan.slices
        assert _plan([replace(boards[0], ram_bytes=rams[0] + more), *boards[1:]], wanted) is not None


def test_boards_with_the_reported_shortfall_hold_the_model() -> None:
    shape = shape_of_config("mixtral-8x7b", NAMED["mixtral-8x7b"])
    b128 = Quantisation(scheme="int4", block=128)
    kind = KINDS["pi5-8g"]

    def boards(count: int) -> list[Board]:
        return [
            Board(name=f"b{k}", kind="pi5-8g", facts=kind, ram_bytes=kind.ram_bytes, link=BoardLink(2e-3, 100, 100))
            for k in range(count)
        ]

    wanted = replace(WANTED, quantisations=(INT4, b128), slices=(1,), replicas=1)
    each = int(variant(shape, b128, 1).unit_bytes * 1.6) + (512 << 10)
    missing = 256 - 3 * boards(1)[0].fits(variant(shape, b128, 1))
    with pytest.raises(FleetTooSmallError) as refused:
        plan_fleet(shape, boards(3), even(shape), wanted)
    assert str(refused.value) == (
        f"{shape.name} does not fit into these boards: it needs {1e-9 * missing * each:.1f} GB more RAM at int4 b128, "
        "which 3 more pi5-8g have"
    )
    plan = plan_fleet(shape, boards(6), even(shape), wanted)
    assert plan.quantisation == "int4 b128"  # with blocks of 32, seven boards are needed
    assert plan_fleet(shape, boards(7), even(shape), wanted).quantisation == "int4 b32"
    small = [replace(one, disk_bytes=10**9) for one in boards(8)]
    with pytest.raises(FleetTooSmallError, match="GB more disk at int4 b128"):
        plan_fleet(shape, small, even(shape), wanted)


def test_what_is_missing_is_one_sentence_with_any_number_of_boards() -> None:
    def refusal(held: int) -> str:
        """With one board that holds so many of the eight experts."""
        ram = board("a").ram_of(variant(SMALL, INT4, 1), held)
        with pytest.raises(FleetTooSmallError) as refused:
            plan_fleet(SMALL, [board("a", ram=ram)], even(SMALL), replace(WANTED, slices=(1,), replicas=1))
        return str(refused.value).partition("at int4 b32")[2]

    assert refusal(5) == ", which 1 more plain has"
    assert refusal(2) == ", which 3 more plain have"
    assert refusal(0) == ", on boards that hold at least one expert each"
    alone = plan_fleet(SMALL, [board("a")], even(SMALL), WANTED)
    assert alone.missing_for_next_copy == "2 boards or more: no board holds two copies"


def test_slices_are_chosen_by_predicted_time() -> None:
    shape = SMALL._replace(hidden=4096, intermediate=14336)
    boards = [board(f"b{k}", ram=2**33) for k in range(8)]
    dedicated = plan_fleet(shape, boards, even(shape), WANTED)
    assert dedicated.slices >= 4
    fastest = min(dedicated.options, key=lambda option: option.ms_per_token)
    assert dedicated.ms_per_token <= fastest.ms_per_token / (1 - 0.03)
    slow = [replace(one, link=BoardLink(2e-3, 10, 10)) for one in boards]
    assert plan_fleet(shape, slow, even(shape), replace(WANTED, shared_air=True)).slices == 1


def test_with_drafts_their_time_decides() -> None:
    """On shared air, halves of experts are faster for one row; the rows of a step with drafts fill the channel."""
    shape = SMALL._replace(hidden=4096, intermediate=14336, experts=8)
    boards = [board(f"b{k}", ram=2**31) for k in range(8)]
    wanted = replace(WANTED, shared_air=True, replicas=1)
    alone = plan_fleet(shape, boards, even(shape), wanted)
    drafted = plan_fleet(shape, boards, even(shape), replace(wanted, draft=(6, 3.4)))
    assert (alone.slices, alone.draft_ms_per_token) == (2, None)
    assert (drafted.slices, drafted.ms_per_token > alone.ms_per_token) == (1, True)
    times = {option.slices: option.draft_ms_per_token for option in drafted.options}
    assert times[1] == drafted.draft_ms_per_token == min(filter(None, times.values()))
    (halves,) = plan_fleet(shape, boards, even(shape), replace(wanted, draft=(6, 3.4), slices=(2,))).options
    assert halves.draft_ms_per_token == times[2]
    (more,) = drafted.more
    assert more.draft_ms_per_token is not None
    assert more.draft_ms_per_token <= (drafted.draft_ms_per_token or 0) * (1 + 1e-9)


def test_the_base_station_keeps_what_fits_and_saves_time() -> None:
    boards = [board(f"b{k}", rtt_ms=20) for k in range(3)]
    without = plan_fleet(SMALL, boards, even(SMALL), WANTED)
    budget = 5 * variant(SMALL, INT4, 1).unit_bytes
    kept = plan_fleet(SMALL, boards, even(SMALL), replace(WANTED, resident_bytes=budget))
    assert without.resident == ""
    assert kept.resident
    assert 0 < kept.resident_bytes <= budget
    assert kept.ms_per_token < without.ms_per_token


def test_one_more_board_is_planned_for() -> None:
    """A second copy needs a second board; with one board's link ten times as slow, a fast one helps."""
    slow, fast = board("slow", mbps=10, kind="slow"), board("fast", mbps=100, kind="fast")
    plan = plan_fleet(SMALL, [slow], even(SMALL), WANTED)
    (more,) = plan.more
    assert (more.kind, more.replicas) == ("slow", 2)
    assert more.ms_per_token < plan.ms_per_token  # two links carry what one did
    gains = {more.kind: more.ms_per_token for more in plan_fleet(SMALL, [slow, fast], even(SMALL), WANTED).more}
    assert gains["fast"] < gains["slow"]


def test_measured_speeds_replace_assumptions() -> None:
    whole, halves = (variant(SMALL, INT4, slices) for slices in (1, 2))
    measured = replace(board("a"), byte_s={str(INT4): RowCurve.line(7e-3, 1e-3).scaled(1 / whole.unit_bytes)})
    assert measured.unit_s(SMALL, whole).at([1, 3]) == pytest.approx([7e-3, 9e-3])
    assert measured.unit_s(SMALL, halves).at([1, 3]) == pytest.approx([3.5e-3, 4.5e-3])
    other = variant(SMALL, Quantisation(scheme="fp32"), 1)
    assert measured.unit_s(SMALL, other) == board("a").unit_s(SMALL, other)


@pytest.mark.parametrize(
    "quantisation",
    [
        INT4, Quantisation(scheme="int4", block=128), Quantisation(scheme="int4", block=32, symmetric=True),
        Quantisation(scheme="int8", block=32), Quantisation(scheme="int8-dynamic"), Quantisation(scheme="fp32"),
        Quantisation(scheme="int4", block=32, w2_bits=8),
    ],
    ids=str,
)  # fmt: skip
def test_planned_sizes_equal_exported_sizes(quantisation: Quantisation) -> None:
    dims = Dims(hidden=4096, intermediate=14336, layers=1, experts=1, top_k=1, vocab=1, max_positions=1)
    shape = SMALL._replace(hidden=4096, intermediate=14336)
    assert variant(shape, quantisation, 1).unit_bytes == pytest.approx(plan_layout(dims, quantisation).bytes, rel=2e-3)


def test_planned_memory_equals_the_nodes_estimate() -> None:
    whole = variant(SMALL, INT4, 1)
    file = FileEntry(path="w", bytes=whole.unit_bytes, sha256="0" * 64)
    entry = ExpertEntry(layer=0, expert=0, files=(file,), probe_output="", error=0.0, source_sha256="0" * 64)
    assert board("a").ram_of(whole, 5) == needed_bytes([entry] * 5, "int4")
    one = board("a", ram=needed_bytes([entry] * 5, "int4"))
    assert one.fits(whole) == 5
    assert replace(one, ram_bytes=one.ram_bytes - 1).fits(whole) == 4


def test_named_models_have_the_shapes_of_the_twins() -> None:
    for name, config in CONFIGS.items():
        assert shape_of_config(name, NAMED[name]) == shape_of_config(name, config)
    assert possible_slices(shape_of_config("q", NAMED["qwen3-30b-a3b"]), INT4) == [1, 2]
    with pytest.raises(ValueError, match="num_local_experts"):
        shape_of_config("dense", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                                  "intermediate_size": 8})  # fmt: skip


def test_the_command_on_paper(tmp_path: Path) -> None:
    command = ("bs_coordinator", "place", "--model", "mixtral-8x7b", "--board", "pi5-8g*8", "--link", "100,2")
    done = run(*command, "--draft-steps", "5,3.2", "--slices", 1, "--slices", 8, "--out", tmp_path / "placement.json")
    assert done.returncode == 0, done.stderr
    assert "mixtral-8x7b: int4 b32 on all boards, 8 slices per expert, one copy" in done.stdout
    assert "ms per token with drafts" in " ".join(done.stdout.split())
    assert "wdmoe-node --id pi5-8g-8 --experts 'L0-31:E0-7/7'" in done.stdout
    assert "assumed: pi5-8g: 10 GB/s" in done.stderr
    assert len(json.loads((tmp_path / "placement.json").read_text())) == 8
    plan = json.loads(run(*command, "--slices", 1, "--json").stdout)["plan"]
    assert (plan["slices"], plan["replicas"], len(plan["boards"])) == (1, 1, 8)
    assert plan["missing_for_next_copy"].endswith(", which 5 more pi5-8g have")
    small = run("bs_coordinator", "place", "--model", "mixtral-8x7b", "--board", "pi5-8g*2")
    assert small.returncode == 49
    assert "GB more RAM at int4 b128, which 4 more pi5-8g have" in small.stderr


def test_the_command_with_measurements(tmp_path: Path, random_bundle: Path) -> None:
    """What `wdmoe-bs nodes --json` and `links --json` print is taken over, and what they do not know is assumed."""
    names = ["a", "b"]
    machine = {
        "host": "h", "pid": 1, "arch": "aarch64", "cpus": 4, "threads": 4, "ram_bytes": 8 << 30,
        "available_bytes": 4 << 30, "wdmoe": "0", "onnxruntime": "0", "disk_free_bytes": 10**10,
    }  # fmt: skip
    dims = {"hidden": 8, "intermediate": 8, "layers": 1, "experts": 2, "top_k": 1, "vocab": 8, "max_positions": 8}
    holding = {
        "experts": "L*:E0", "model_sha256": "0" * 64, "dims": dims, "quantisation": "int4 b32", "resident_bytes": 2**30,
    }  # fmt: skip
    nodes = [
        {
            "schema": 1, "node": name, "boot_id": "x", "state": "online", "since_unix_ms": 1, "holding": holding,
            "machine": machine, "device": {"profile": "pi5", "because": "", "provider": "cpu"},
        }
        for name in names
    ]  # fmt: skip
    link = {
        "rtt_s": 0.004, "rtt_std_s": 0.001, "down_mbps": 50.0, "down_std_mbps": 5.0, "up_mbps": 40.0,
        "up_std_mbps": 4.0,
    }  # fmt: skip
    links: list[dict[str, Any]] = [
        {"node": name, "link": link, "fixed_s": 0.001, "expert_s": 0.002, "row_s": 0.001, "requests": 9}
        for name in names
    ]
    (tmp_path / "nodes.json").write_text(json.dumps({"nodes": nodes}))
    (tmp_path / "links.json").write_text(json.dumps(links))
    command = ("bs_coordinator", "place", "--bundle", random_bundle, "--fleet", tmp_path / "nodes.json", "--json")
    done = run(*command, "--links", tmp_path / "links.json", "--trunk-ms", 5)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["plan"]["replicas"] == 2
    assert [one["kind"] for one in document["plan"]["boards"]] == ["pi5-8g"] * 2
    assert document["plan"]["boards"][0]["ram_limit_bytes"] == 5 << 30
    assert [line.partition(":")[0] for line in document["assumed"]] == ["routing"]

    more = ("--quant", "int8", "--draft-steps", "5,3.2", "--resident", "1M")
    other = run(*command, "--links", tmp_path / "links.json", "--trunk-ms", 5, *more)
    about = [line.partition(":")[0] for line in json.loads(other.stdout)["assumed"]]
    assert about == ["routing", "drafts", "experts on the base station", "pi5-8g"]

    def planned(*options: object) -> tuple[float, list[str]]:
        """The time per token, and what is assumed of links."""
        (tmp_path / "links.json").write_text(json.dumps(links))
        done = run(*command, "--links", tmp_path / "links.json", "--trunk-ms", 5, "--replicas", 1, *options)
        found = json.loads(done.stdout)
        return found["plan"]["ms_per_token"], [line for line in found["assumed"] if line.startswith("links")]

    links[1]["link"] = {**link, "up_mbps": 100.0}
    as_assumed_ms, lines = planned()
    assert lines == []
    links[1]["link"] = {**link, "up_mbps": 34_308.0, "up_std_mbps": 8e7}  # shown as "> 7"
    ms, (line,) = planned()
    assert line.startswith("links of b: 100 Mbit/s from the board, because the measurement is too uncertain")
    assert ms == as_assumed_ms
    slow_ms, lines = planned("--link", "b=0.1,2")
    assert slow_ms > ms  # stated, so not assumed
    assert lines == []
    links[1]["link"] = {**link, "rtt_s": 0.002 + BROKER_S}
    as_assumed_ms, lines = planned()
    assert lines == []
    links[1]["link"] = {**link, "rtt_s": 0.9, "rtt_std_s": 0.5}
    ms, (line,) = planned()
    assert line.startswith("links of b: a round trip of 2 ms, because the measurement is too uncertain")
    assert ms == as_assumed_ms
    links[1]["link"] = {**link, "rtt_s": 1e-4, "rtt_std_s": 9e-5}
    assert planned()[1] == [], "too short to matter"
    del links[1]
    assert planned()[1] == ["links of b: 100 Mbit/s and 2 ms, not measured; see --link and --links"]
    assert planned("--link", "100,2")[1] == []
    (tmp_path / "links.json").write_text("[1]")
    wrong = run(*command, "--links", tmp_path / "links.json")
    assert wrong.returncode == 12
    assert "is not the output of 'wdmoe-bs links --json'" in wrong.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "mixtral-8x7b"),
        ("--board", "pi5-8g"),
        ("--model", "mixtral-8x7b", "--board", "pi6"),
        ("--model", "mixtral-8x7b", "--board", "pi5-8g", "--board", "a=pi5-8g", "--board", "a=pi4-8g"),
        ("--model", "mixtral-8x7b", "--board", "pi5-8g", "--link", "0,2"),
        ("--model", "mixtral-8x7b", "--board", "pi5-8g", "--link", "nowhere=10,2"),
        ("--model", "mixtral-8x7b", "--board", "pi5-8g", "--quant", "int3"),
        ("--model", "mixtral-8x7b", "--board", "pi5-8g", "--draft-steps", "2,3"),
        ("--model", "mixtral-8x7b", "--board", "pi5-8g", "--tuned", "pi5-8g=no-such-file"),
        ("--bundle", "b", "--node", "a=1G", "--shared-air"),
    ],
)
def test_what_the_command_refuses(options: tuple[str, ...]) -> None:
    assert run("bs_coordinator", "place", *options).returncode == 2
