"""A small run of `versus` with our arms only, on emulated links with real processes."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Run
from tests.needs import needs
from wire.manifest import Scheme

pytestmark = needs("mosquitto", network=True)


def test_arms_take_turns_and_a_killed_device_degrades_the_answer(
    run: Run, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(
        "testbed", "versus", "--bundle", tiny_bundle("int4"), "--arm", "ours", "--rtt-ms", "2", "--rtt-ms", "10",
        "--channel", "dedicated", "--devices", "2", "--prompts", "1", "--tokens", "12", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "versus.json").read_text())
    near, far, killed = document["answers"]
    assert [one["profile"] for one in (near, far)] == ["dedicated-100-2", "dedicated-100-10"]
    assert near["pieces"] == far["pieces"]
    layers, later = 2, len(near["pieces"]) - 1
    for one, rtt_ms in ((near, 2), (far, 10)):
        assert one["outcome"] == "finished"
        # No token is faster than the round trips of its layers, and each brought two messages of a hidden state.
        assert one["at_ms"][-1] - one["at_ms"][0] > layers * rtt_ms * later
        assert one["traffic"]["down_bytes"] > layers * 576 * 2 * later
        assert one["traffic"]["up_bytes"] > layers * 576 * 2 * later
    assert killed["killed"] == "node0"
    assert killed["prompt"] == near["prompt"]
    assert killed["outcome"] == "degraded"
    assert {one["device"] for one in document["memory"]["ours"]} == {"bs", "node0", "node1"}
    assert "| ours |" in (out / "versus.md").read_text()
    assert "a link for each device" in (out / "tpot.svg").read_text()
