"""Which node holds which expert, as the registry reads it from statuses."""

import msgspec
import pytest

from bs_coordinator.nodes.registry import NodeRegistry
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
