"""Descriptions of emulated networks: what is refused, and how links change over time."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import NetworkSpecError
from testbed.network.spec import LinkSpec, NetworkSpec, read_spec
from testbed.network.timeline import Timeline

SHIPPED = Path("testbed/network/specs/wifi.yaml")
BASE = "name: t\nnodes: 2\nprofiles:\n  p: "


def _spec(tmp_path: Path, text: str) -> NetworkSpec:
    path = tmp_path / "net.yaml"
    path.write_text(text)
    return read_spec(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BASE + "{shared: true}", "unknown field `shared`"),
        (BASE + "{default: {rate: 5}}", "unknown field `rate`"),
        (BASE + "{default: {down_mbps: 0}}", "down_mbps"),
        (BASE + "{default: {delay_ms: .nan}}", "delay_ms"),
        (BASE + "{default: {delay_ms: 1, jitter_ms: 2}}", "jitter_ms 2 of node0 at 0 s is more than its delay_ms 1"),
        (BASE + "{nodes: {node2: {up_mbps: 1}}}", "'node2' is not one of the nodes node0, node1"),
        (BASE + "{events: [{at_s: 1}]}", "events[0]: give either set or ramp_to"),
        (BASE + "{events: [{at_s: 1, ramp_to: {up_mbps: 1}}]}", "a ramp needs for_s"),
        (BASE + "{events: [{at_s: 1, nodes: [x], set: {up_mbps: 1}}]}", "'x' is not one of the nodes"),
        (BASE + "{events: [{at_s: 9, set: {up_mbps: 1}}], repeat_s: 5}", "at_s 9 is never reached"),
        (
            BASE + "{default: {delay_ms: 4, jitter_ms: 4}, events: [{at_s: 2, for_s: 1, ramp_to: {delay_ms: 1}}]}",
            "jitter_ms 4 of node0 at 3 s",
        ),
        ("name: t-1\nprofiles: {p: {}}", "name"),
        ("name: t\nprofiles: {}", "profiles"),
        ("name: t\nnodes: [a, a]\nprofiles: {p: {}}", "'a' is listed twice"),
        ("name: t\nnodes: [bs]\nprofiles: {p: {}}", "base station's name"),
        ("name: t\nnodes: [../x]\nprofiles: {p: {}}", "not valid"),
        ("name: t\nnodes: 8\nsubnet: 10.0.0.0/29\nprofiles: {p: {}}", "no room"),
        ("name: t\nsubnet: 10.0.0.1/24\nprofiles: {p: {}}", "subnet: 10.0.0.1/24 has host bits set"),
        ("name: [", "net.yaml"),
    ],
)
def test_wrong_descriptions_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(NetworkSpecError) as raised:
        _spec(tmp_path, text)
    assert says in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkSpecError, match=r"gone\.yaml: No such file"):
        read_spec(tmp_path / "gone.yaml")


def test_shipped_networks_have_eight_nodes_and_all_profiles() -> None:
    spec = read_spec(SHIPPED)
    assert spec.node_ids == tuple(f"node{k}" for k in range(8))
    assert set(spec.profiles) == {
        "lan", "uniform", "mixed", "mixed-shared", "walk", "jitter", "loss1", "step", "burst",
    }  # fmt: skip
    shared = {name for name, profile in spec.profiles.items() if profile.shared_air}
    assert shared == {"mixed-shared"}
    for at_s in (0.0, 25.0, 70.0):
        assert spec.links("mixed", at_s) == spec.links("mixed-shared", at_s)
    assert spec.links("step", 14.9)["node3"].down_mbps == 50
    assert spec.links("step", 15.0)["node3"].down_mbps == 20
    assert spec.links("step", 45.0)["node3"].down_mbps == 50
    assert (spec.address(0), spec.address(8)) == ("10.77.0.1", "10.77.0.9")


EVENTS = """
name: t
nodes: 2
profiles:
  p:
    default: {down_mbps: 40, delay_ms: 2}
    nodes: {node1: {up_mbps: 7}}
    events:
      - {at_s: 30, for_s: 2, set: {down_mbps: 1, loss_percent: 5}}
      - {at_s: 10, for_s: 20, nodes: [node0], ramp_to: {down_mbps: 20, delay_ms: 4}}
      - {at_s: 50, nodes: [node1], set: {delay_ms: 9}}
    repeat_s: 100
"""


@pytest.mark.parametrize(
    ("at_s", "node", "link"),
    [
        (0, "node0", LinkSpec(down_mbps=40, delay_ms=2)),
        (20, "node0", LinkSpec(down_mbps=30, delay_ms=3)),
        (30, "node0", LinkSpec(down_mbps=1, delay_ms=4, loss_percent=5)),
        (32, "node0", LinkSpec(down_mbps=20, delay_ms=4)),
        (99, "node0", LinkSpec(down_mbps=20, delay_ms=4)),
        (120, "node0", LinkSpec(down_mbps=30, delay_ms=3)),
        (31, "node1", LinkSpec(down_mbps=1, up_mbps=7, delay_ms=2, loss_percent=5)),
        (60, "node1", LinkSpec(down_mbps=40, up_mbps=7, delay_ms=9)),
        (100, "node1", LinkSpec(down_mbps=40, up_mbps=7, delay_ms=2)),
    ],
)
def test_events_change_links(tmp_path: Path, at_s: float, node: str, link: LinkSpec) -> None:
    assert _spec(tmp_path, EVENTS).links("p", at_s)[node] == link


@given(st.lists(st.floats(0.01, 0.3), min_size=1, max_size=400))
def test_truth_is_recorded_at_steps_at_once_and_on_ramps_every_second(pauses: list[float]) -> None:
    spec = read_spec(SHIPPED)
    now = 1000.0
    timeline = Timeline(spec, now)
    timeline.set_profile("walk", now)
    assert set(timeline.to_record(now)) == set(spec.node_ids)
    records = []
    for pause_s in pauses:
        now += pause_s
        timeline.advance(now)
        assert timeline.links == spec.links("walk", now - 1000.0)
        records += [(now, node, link) for node, link in timeline.to_record(now).items()]
    assert {node for _, node, _ in records} <= {"node0", "node1", "node2", "node3"}
    of_first = [(at, link) for at, node, link in records if node == "node0"]
    on_ramp = [at for at, _ in of_first if 5 <= at - 1000 < 25]
    assert all(0.999 < later - earlier < 1.5 for earlier, later in itertools.pairwise(on_ramp))
    if 26 < now - 1000 < 50:
        assert of_first[-1][1] == timeline.links["node0"]


def test_a_held_profile_stands_still_and_starts_again() -> None:
    timeline = Timeline(read_spec(SHIPPED), 0.0)
    timeline.set_profile("step", 0.0)
    timeline.hold(20.0, 3.0)
    assert timeline.links["node0"].down_mbps == 20
    assert not timeline.advance(100.0)
    timeline.hold(None, 100.0)
    assert timeline.links["node0"].down_mbps == 50
    assert timeline.advance(116.0)
    with pytest.raises(ValueError, match="no profile 'x', only lan"):
        timeline.set_profile("x", 0.0)
