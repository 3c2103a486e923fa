"""The benchmark of all levers together: its networks, who holds what, and how answers are compared."""

from collections import Counter
from pathlib import Path

import pytest

from testbed.bench.sections.levers import (
    ALONE,
    CHANNELS,
    EVERYTHING,
    NODES,
    SLICED,
    SLICES,
    WHOLE,
    Arm,
    Measured,
    compared,
    network_spec,
)  # fmt: skip
from testbed.network.spec import read_spec
from wire.experts import parse_selector


def test_each_network_is_a_profile_of_all_nodes(tmp_path: Path) -> None:
    path = tmp_path / "network.yaml"
    path.write_text(network_spec("bench1"))
    spec = read_spec(path)
    assert set(spec.node_ids) == WHOLE.keys() == SLICED.keys()
    assert [profile.shared_air for profile in spec.profiles.values()] == [shared for shared, _ in CHANNELS.values()]
    for profile in spec.profiles.values():
        assert 2 * profile.link("node0", 0).delay_ms == 5


@pytest.mark.parametrize(("held", "slices"), [(WHOLE, 1), (SLICED, SLICES)])
def test_every_expert_is_held_once_and_nodes_hold_equally_much(held: dict[str, str], slices: int) -> None:
    units = {node: parse_selector(text, layers=2, experts=NODES, slices=slices) for node, text in held.items()}
    counts = Counter(unit for some in units.values() for unit in some)
    assert set(counts.values()) == {1}
    assert len(counts) == 2 * NODES * slices
    assert len({len(some) for some in units.values()}) == 1


def test_each_lever_is_measured_alone_and_all_that_a_bundle_can_have_together() -> None:
    plain, *others = ALONE.values()
    assert plain == Arm()
    for arm in others:
        assert sum(value != usual for value, usual in zip(arm, plain, strict=True)) == 1
    assert sum(value != usual for value, usual in zip(EVERYTHING, plain, strict=True)) == len(others) - 1


def test_answers_are_compared_with_the_plain_ones_of_the_same_prompts() -> None:
    def answer(prompt: int, ids: list[int], ms: float, size: float) -> Measured:
        return Measured(channel="c", arm="a", prompt=prompt, ids=ids, tpot_ms=ms, token_bytes=size)

    pairs = [
        (answer(0, [1, 2, 3], 10.0, 100.0), answer(0, [1, 2, 3], 20.0, 200.0)),
        (answer(1, [1, 5], 30.0, 300.0), answer(1, [1, 4, 6], 60.0, 400.0)),
        (answer(2, [9], 0.0, 0.0), answer(2, [9], 0.0, 0.0)),  # ended at once: no time per token
    ]
    row = compared("drafts", pairs, Arm(draft="auto"))
    assert (row.ours_ms, row.floor_ms, row.ratio) == ([10.0, 30.0], [20.0, 60.0], 0.5)
    parameters = row.parameters
    assert (parameters["token_bytes"], parameters["plain_token_bytes"]) == (200.0, 300.0)
    assert (parameters["identical"], parameters["compared"], parameters["draft"]) == (2, 3, "auto")
