"""Presets: what they choose from which facts, that given options stay, and that `exact` leaves answers as they are."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.commands.generate import generate
from bs_coordinator.config import BaseStationConfig, PresetName, ResidentConfig, SamplingConfig
from bs_coordinator.metrics import StationMetrics
from bs_coordinator.presets import Facts, Link, choose
from bs_coordinator.presets.choice import MEMORY_SHARE
from bs_coordinator.presets.scores import INT8_WIRE, MOST_LOST_POINTS, MOST_PERPLEXITY, POLICIES
from common.options import checked_config
from tests.node_threads import node_thread
from wire.tensors import WireDtype
from wire.transports.memory import MemoryBroker

ROOT = Path(__file__).parents[3]
MODELS = {
    folder.name: json.loads((folder / "differences.json").read_bytes())["model_sha256"]
    for folder in sorted((ROOT / "models").iterdir())
}
"""Hash of each demo model, by name."""
FIRST = MODELS["smol-mixtral-8x135m"]
ASKED = BaseStationConfig(bundle=Path("b"))
PRESETS: tuple[PresetName, ...] = ("fast", "exact", "field")

_mbps = st.floats(0.1, 1e4) | st.just(math.inf)
_links = st.lists(st.builds(Link, st.floats(0.01, 1e3), _mbps, _mbps), max_size=9).map(tuple)
_node = st.sampled_from(("", "pi1"))
facts_of_all_kinds = st.builds(
    Facts,
    links=_links,
    shared_air=st.booleans(),
    free_bytes=st.integers(0, 2**40),
    all_experts_bytes=st.integers(2**21, 2**40),
    one_expert_bytes=st.integers(2**20, 2**21),
    sums_units=_node,
    other_arch=_node,
    model_sha256=st.sampled_from((*MODELS.values(), "0" * 64)),
    hidden=st.sampled_from((576, 4096)),
    top_k=st.integers(1, 8),
    scored=st.booleans(),
    draft_model=st.booleans(),
    why_no_drafts=st.sampled_from(("", "the trunk runs on cuda")),
)
configs = st.builds(
    lambda draft, wire, policy, resident, degrade, given: replace(
        ASKED, draft=draft, wire=wire, policy=policy, resident=resident, degrade=degrade, given=given
    ),
    st.sampled_from(("none", "ngram", "dense", "auto")),
    st.sampled_from(list(WireDtype)),
    st.sampled_from(("topk", "top1", "wdmoe:gain=1.3")),
    (st.none() | st.integers(0, 2**40)).map(ResidentConfig),
    st.booleans(),
    st.frozensets(st.sampled_from(("draft", "wire", "policy", "degrade"))),
)
EVEN, UNEVEN = (Link(5, 100, 100),) * 8, (*(Link(2, 100, 100),) * 4, *(Link(4, 50, 50),) * 2, *(Link(10, 20, 20),) * 2)


def facts(**changes: object) -> Facts:
    """An ordinary base station with the first demo model, with room for half of its experts."""
    usual = Facts(
        links=UNEVEN, shared_air=False, free_bytes=500 << 20, all_experts_bytes=500 << 20, one_expert_bytes=4 << 20,
        sums_units="", other_arch="", model_sha256=FIRST, hidden=576, top_k=2, scored=True, draft_model=False,
        why_no_drafts="",
    )  # fmt: skip
    return replace(usual, **changes)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(st.sampled_from(PRESETS), configs, facts_of_all_kinds)
def test_what_was_given_stays_and_is_said(preset: PresetName, config: BaseStationConfig, known: Facts) -> None:
    choice = choose(preset, config, known)
    default = BaseStationConfig(bundle=Path("b"))
    for name in ("draft", "wire", "policy", "resident", "degrade"):
        wanted = getattr(config, name)
        if wanted != getattr(default, name) or name in config.given:
            assert getattr(choice.config, name) == wanted
            (lever,) = [lever for lever in choice.levers if lever.name == name]
            assert lever.why == "as given"
    assert [lever.name for lever in choice.levers] == ["draft", "wire", "policy", "resident", "degrade"]
    assert all(line.startswith(f"preset {preset}: ") and "\n" not in line for line in choice.lines)


@settings(max_examples=60)
@given(facts_of_all_kinds)
def test_exact_leaves_answers_as_they_are_whatever_is_measured(known: Facts) -> None:
    choice = choose("exact", ASKED, known)
    config = choice.config
    assert (config.policy, config.wire, config.draft, config.degrade) == ("topk", WireDtype.FP16, "auto", False)
    if known.sums_units or known.other_arch:
        assert not config.resident.budget_bytes
    assert not any(lever.quality for lever in choice.levers)


@settings(max_examples=60)
@given(facts_of_all_kinds, facts_of_all_kinds)
def test_field_chooses_the_same_whatever_is_measured(one: Facts, other: Facts) -> None:
    assert choose("field", ASKED, one) == choose("field", ASKED, other)
    config = choose("field", ASKED, one).config
    assert (config.policy, config.draft, config.resident, config.degrade) == ("topk", "none", ResidentConfig(), True)


@settings(max_examples=60)
@given(facts_of_all_kinds)
def test_fast_stays_within_its_limits_of_quality_and_memory(known: Facts) -> None:
    choice = choose("fast", ASKED, known)
    config = choice.config
    if config.policy != "topk":
        assert known.scored
        assert known.links
        (score,) = [score for score in POLICIES[known.model_sha256] if score.policy == config.policy]
        assert min(score.points) >= -MOST_LOST_POINTS
    if config.wire != WireDtype.FP16:
        assert config.wire == WireDtype.INT8
        assert INT8_WIRE[known.model_sha256] <= MOST_PERPLEXITY
    if room := config.resident.budget_bytes:
        assert known.one_expert_bytes <= room <= MEMORY_SHARE * known.free_bytes + 2**20
    differs = {"policy": config.policy != "topk", "wire": config.wire != WireDtype.FP16}
    for lever in choice.levers:
        assert bool(lever.quality) == differs.get(lever.name, False)


@pytest.mark.parametrize(
    ("changes", "policy", "why"),
    [
        ({}, "subset", "the slowest link takes 3."),
        ({"shared_air": True}, "subset", "32% less waiting"),
        ({"links": EVEN}, "topk", "the links are alike"),
        ({"links": ()}, "topk", "no link was measured"),
        ({"links": (*(Link(0.4, 1e4, 1e4),) * 7, Link(0.8, 1e4, 1e4))}, "topk", "only 0.4 ms more than the median"),
        ({"free_bytes": 2 << 30}, "topk", "all experts are here"),
        ({"draft_model": True}, "topk", "drafts save more"),
        ({"draft_model": True, "why_no_drafts": "the trunk runs on cuda"}, "subset", "the slowest link"),
        ({"model_sha256": MODELS["smol-qwen3moe-16x"]}, "topk", "subset loses 5.3 points of accuracy"),
        ({"model_sha256": "0" * 64}, "topk", "was measured on this model"),
        ({"scored": False}, "topk", "is not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "usual",
)
def test_fast_takes_a_policy_where_its_cost_is_known_and_small(
    changes: dict[str, object], policy: str, why: str
) -> None:
    choice = choose("fast", ASKED, facts(**changes))
    (lever,) = [lever for lever in choice.levers if lever.name == "policy"]
    assert lever.value == choice.config.policy == policy
    assert why in lever.why


@pytest.mark.parametrize(
    ("changes", "config", "why"),
    [
        ({"draft_model": True}, ASKED, "with the draft model"),
        ({"links": EVEN}, ASKED, "look-ups only"),
        ({}, ASKED, "none beside the policy subset"),
        ({"draft_model": True}, replace(ASKED, policy="top1"), "none beside the policy top1"),
        ({"draft_model": True, "why_no_drafts": "the trunk runs on cuda"}, ASKED, "none: the trunk runs on cuda"),
    ],
)
def test_it_is_said_what_drafts_there_will_be(changes: dict[str, object], config: BaseStationConfig, why: str) -> None:
    (lever,) = [lever for lever in choose("fast", config, facts(**changes)).levers if lever.name == "draft"]
    assert lever.value == "auto"
    assert lever.why.startswith(why)


def test_drafts_that_are_refused_leave_room_for_a_policy() -> None:
    known = facts(draft_model=True)
    assert choose("fast", replace(ASKED, draft="none"), known).config.policy == "subset"


def test_local_experts_take_half_of_the_memory_or_what_all_need() -> None:
    for free, room in ((500, 250), (1000, 500), (2000, 500)):
        config = choose("fast", ASKED, facts(free_bytes=free << 20)).config
        assert config.resident == ResidentConfig(room << 20)
    assert not choose("fast", ASKED, facts(free_bytes=7 << 20)).config.resident.budget_bytes
    assert not choose("exact", ASKED, facts(sums_units="pi1")).config.resident.budget_bytes
    assert choose("exact", replace(ASKED, wire=WireDtype.FP32), facts(sums_units="pi1")).config.resident.budget_bytes


def test_where_local_experts_begin_and_lie_counts_whoever_chose_them() -> None:
    wishes = ResidentConfig(begin_with=Path("latency.csv"), prepacked=Path("p"), traffic=Path("t.json"))
    for free, room in ((500, 250 << 20), (7, None)):
        asked = replace(ASKED, preset="fast", resident=wishes)
        chosen = choose("fast", asked, facts(free_bytes=free << 20)).config.resident
        assert chosen == replace(wishes, budget_bytes=room)


def test_scores_are_those_of_the_documents() -> None:
    """The tables of docs/results.md in their order: first model on both networks, second model on both."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition("## Policies on six data sets")[2]
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `subset` |")]
    number = re.compile(r"[+−]?\d+\.\d+")
    waits, points = ([float(number.search(row[at])[0].replace("−", "-")) for row in rows] for at in (2, -2))  # type: ignore[index]
    for i, model in enumerate(("smol-mixtral-8x135m", "smol-qwen3moe-16x")):
        (score,) = POLICIES[MODELS[model]]
        assert score.points == (points[2 * i], points[2 * i + 1])
        assert score.waits_less == pytest.approx([1 - wait for wait in waits[2 * i : 2 * i + 2]])
    assert len(rows) == 4


def test_the_command_and_python_tell_what_was_given() -> None:
    line = ["--bundle", "b", "--prompt", "p", "--preset", "fast", "--wire", "fp16", "--no-degrade", "--resident", "0"]
    context = generate.make_context("generate", line)
    seen: list[BaseStationConfig] = []
    with context, pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def opened(config: BaseStationConfig) -> Iterator[None]:
            seen.append(config)
            raise InterruptedError
            yield

        patch.setattr("bs_coordinator.commands.generate.open_station", opened)
        with pytest.raises(InterruptedError):
            generate.invoke(context)
    config = checked_config(
        BaseStationConfig, {"bundle": "b", "preset": "fast", "wire": "fp16", "degrade": False, "resident": 0}
    )
    for made in (*seen, config):
        choice = choose("fast", made, facts(model_sha256="0" * 64))
        assert [lever.name for lever in choice.levers if lever.why == "as given"] == ["wire", "resident", "degrade"]
        assert not choice.config.resident.budget_bytes


@contextmanager
def _station(bundle: Path, **options: object) -> Iterator[BaseStation]:
    with MemoryBroker() as broker, ExitStack() as stack:
        for expert in range(4):
            stack.enter_context(node_thread(bundle, broker.address, f"n{expert}", f"L*:E{expert}"))
        config = BaseStationConfig(bundle=bundle, **options)  # type: ignore[arg-type]
        yield stack.enter_context(open_base_station(config, broker.address))


def test_exact_answers_as_without_a_preset_with_local_experts(random_bundle: Path, tmp_path: Path) -> None:
    answers = []
    all_options: list[dict[str, object]] = [
        {"draft": "none"}, {"preset": "exact", "resident": ResidentConfig(prepacked=tmp_path)}
    ]  # fmt: skip
    for options in all_options:
        with _station(random_bundle, **options) as station:
            events = station.new_sequence().generate([1, 2, 3, 4, 5], SamplingConfig(max_tokens=12))
            answers.append([event.id for event in events])
            levers = station.levers
            text, _ = StationMetrics(station.dispatcher, preset=levers).exposition("")
            assert ('wdmoe_preset_info{degrade="no",draft="auto",name="exact",' in text.decode()) == bool(levers)
    assert answers[0] == answers[1]
    assert levers["preset"] == "exact"
    assert station.residents is not None
    assert station.residents.ids
    assert list(tmp_path.iterdir())  # copies of them


def test_without_a_preset_nothing_is_chosen(random_bundle: Path) -> None:
    with _station(random_bundle) as station:
        assert station.choice is None
        assert station.levers == {}
        assert station.residents is None
