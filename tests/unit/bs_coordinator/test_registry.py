"""Which node holds which expert, as the registry reads it from statuses."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.nodes.registry import LOCAL_NODE, NodeRegistry
from wire import status
from wire.experts import ExpertId
from wire.manifest import Dims
from wire.status import FRAME_TAGS, SCHEMA, Holding, NodeStatus

DIMS = Dims(hidden=8, intermediate=16, layers=2, experts=4, top_k=2, vocab=50, max_positions=64)


def _online(node: str, experts: str, *, dims: Dims = DIMS, boot: str = "1") -> NodeStatus:
    holding = Holding(experts=experts, model_sha256="m", dims=dims, quantisation="fp32", resident_bytes=1)
    return NodeStatus(schema=SCHEMA, node=node, boot_id=boot, state="online", since_unix_ms=1, holding=holding)


@pytest.mark.parametrize("change", [{"layers": 1 << 14}, {"layers": 1, "experts": 1 << 16}, {"hidden": 16}])
def test_a_status_of_other_dimensions_is_ignored_before_its_selector_is_expanded(
    change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = NodeRegistry(DIMS, "m")
    registry.apply(_online("a", "L*:E*"))
    expanded: list[str] = []
    monkeypatch.setattr(status, "parse_selector", lambda text, **_: expanded.append(text))
    lie = _online("b", "L*:E*", dims=msgspec.structs.replace(DIMS, **change))
    registry.apply(status.decode_status(status.encode_status(lie), "b"))
    assert expanded == []
    assert list(registry.nodes) == ["a"]
    assert "other dimensions" in registry.ignored["b"]
    assert registry.missing() == []


def test_a_selector_is_expanded_once_while_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = NodeRegistry(DIMS, "m")
    for node in "ab":
        registry.apply(_online(node, "L0:E*"))
    monkeypatch.setattr(status, "parse_selector", lambda text, **_: (ExpertId(1, 3),))
    registry.apply(_online("a", "L0:E*", boot="2"))
    assert registry.holders(ExpertId(0, 0)) == ("a", "b")
    registry.apply(_online("a", "L1:E3"))
    assert (registry.holders(ExpertId(0, 0)), registry.holders(ExpertId(1, 3))) == (("b",), ("a",))
    registry.apply(_online("a", "L1:E3", dims=msgspec.structs.replace(DIMS, vocab=51)))
    assert registry.holders(ExpertId(1, 3)) == ()


@pytest.mark.parametrize(
    ("tagged", "frame_tags", "reason"),
    [
        (True, FRAME_TAGS, ""),
        (False, 0, ""),
        (None, FRAME_TAGS, ""),
        (True, 0, "--frame-key, or update it"),
        (True, FRAME_TAGS + 1, "another version"),
        (False, FRAME_TAGS, "--cluster-key"),
    ],
)
def test_nodes_whose_frames_have_other_tags_are_ignored_with_a_reason(
    tagged: bool | None, frame_tags: int, reason: str
) -> None:
    registry = NodeRegistry(DIMS, "m", tagged=tagged)
    registry.apply(msgspec.structs.replace(_online("a", "L*:E*"), frame_tags=frame_tags))
    assert reason in registry.ignored.get("a", "")
    assert (registry.boot_id("a"), list(registry.nodes)) == (("", []) if reason else ("1", ["a"]))


statuses = st.tuples(
    st.sampled_from("abcd"), st.sampled_from(["L*:E*", "L0:E0-1", "L1:E3", "offline", "another model"]),
    st.sampled_from("12"),
)  # fmt: skip


@given(st.lists(statuses, max_size=12), st.sampled_from([(), (ExpertId(0, 0), ExpertId(1, 3))]))
def test_holders_do_not_depend_on_the_way_that_led_to_them(
    sent: list[tuple[str, str, str]], local: tuple[ExpertId, ...]
) -> None:
    def applied(some: list[tuple[str, str, str]], registry: NodeRegistry) -> NodeRegistry:
        for node, experts, boot in some:
            document = _online(node, "L*:E*" if experts in ("offline", "another model") else experts, boot=boot)
            if experts == "offline":
                document = msgspec.structs.replace(document, state="offline", holding=None)
            if experts == "another model" and document.holding is not None:
                holding = msgspec.structs.replace(document.holding, model_sha256="x")
                document = msgspec.structs.replace(document, holding=holding)
            registry.apply(document)
        return registry

    registry = NodeRegistry(DIMS, "m")
    registry.hold_locally(frozenset(local))
    applied(sent, registry)
    last = applied(list({each[0]: each for each in sent}.values()), NodeRegistry(DIMS, "m"))
    last.hold_locally(frozenset(local))
    every = [ExpertId(layer, expert) for layer in range(2) for expert in range(4)]
    assert [registry.holders(id) for id in every] == [last.holders(id) for id in every]
    assert registry.missing() == last.missing()
    assert registry.ignored.keys() == last.ignored.keys()
    registry.forget()
    assert [registry.holders(id) for id in every] == [(LOCAL_NODE,) * (id in local) for id in every]


def test_a_flood_of_statuses_changes_nothing_where_experts_stay() -> None:
    registry = NodeRegistry(DIMS, "m")
    registry.apply(_online("a", "L*:E*"))
    changes = registry.changes
    for number in range(100):
        registry.apply(_online("a", "L*:E*"))
        registry.apply(msgspec.structs.replace(_online(f"ghost{number}", "L*:E*"), state="offline", holding=None))
    assert registry.changes == changes
