"""A small run of `versus` with our arms only, on emulated links with real processes."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.gguf_models import write_gguf
from tests.needs import needs
from wire.experts import format_ranges
from wire.manifest import Scheme, load_manifest

pytestmark = needs("mosquitto", network=True)


def test_arms_take_turns_and_a_killed_device_degrades_the_answer(
    run: Run, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(
        "testbed", "versus", "--bundle", tiny_bundle("int4"), "--arm", "ours", "--rtt-ms", "10", "--rtt-ms", "30",
        "--channel", "dedicated", "--devices", "2", "--prompt", "Say it again.", "--tokens", "24", "--ignore-eos",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "versus.json").read_text())
    near, far, killed = document["answers"]
    assert [one["profile"] for one in (near, far)] == ["dedicated-100-10", "dedicated-100-30"]
    assert near["pieces"] == far["pieces"]
    assert near["said_tokens"] == far["said_tokens"] == 24
    assert document["parameters"]["prompts"] == ["Say it again."]
    assert document["parameters"]["trunk"] == {"--device": "cpu", "--dtype": "fp32"}
    layers, later = 2, len(near["pieces"]) - 1
    for one, rtt_ms in ((near, 10), (far, 30)):
        assert one["outcome"] == "finished"
        # No token is faster than the round trips of its layers, and each brought two messages of a hidden state.
        assert one["at_ms"][-1] - one["at_ms"][0] > layers * rtt_ms * later
        # Half of it, because the first tokens may have been sent before the counters were read.
        assert one["traffic"]["down_bytes"] > layers * 576 * later
        assert one["traffic"]["up_bytes"] > layers * 576 * later
    assert killed["killed"] == "node0"
    assert killed["prompt"] == near["prompt"]
    assert killed["outcome"] == "degraded"
    assert {one["device"] for one in document["memory"]["ours"]} == {"bs", "node0", "node1"}
    assert document["local_experts"] == {"ours": [0, 16]}
    assert "| ours |" in (out / "versus.md").read_text()
    assert "a link for each device" in (out / "tpot.svg").read_text()


def test_a_preset_that_keeps_all_experts_is_shown_as_not_distributed(
    run: Run, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run(
        "testbed", "versus", "--bundle", tiny_bundle("int4"), "--arm", "ours-fast", "--rtt-ms", "10", "--channel",
        "dedicated", "--devices", "1", "--prompts", "1", "--tokens", "4", "--no-kill", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here, every = json.loads((out / "versus.json").read_text())["local_experts"]["ours-fast"]
    assert here == every == 16
    assert (out / "versus.md").read_text().count("| ours-fast (all experts local) |") == 2
    assert "ours-fast (all experts local)" in (out / "tpot.svg").read_text()


def _stand_in(path: Path, tokens: int) -> Path:
    """A program that answers like llama-server at the port of its `--port`, and logs on which cores it may run."""
    head = Path(__file__).parents[2] / "stand_in_head.py"
    path.write_text(
        f'#!/bin/sh\ngrep Cpus_allowed_list /proc/self/status\nwhile [ "$1" != --port ]; do shift; done\n'
        f'exec {sys.executable} {head} "$2" finish {tokens}\n'
    )
    path.chmod(0o755)
    return path


def _write_model(path: Path, bundle: Path) -> None:
    dims = load_manifest(bundle).dims
    write_gguf(path, hidden=dims.hidden, experts=dims.experts, top_k=dims.top_k)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for the device and one more")
def test_a_device_has_a_core_of_its_own(run: Run, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path) -> None:
    server, rpc = (_stand_in(tmp_path / name, 4) for name in ("server", "rpc"))
    model, out = tmp_path / "model.gguf", tmp_path / "out"
    _write_model(model, tiny_bundle("int4"))
    before = os.sched_getaffinity(0)
    done = run(
        "testbed", "versus", "--bundle", tiny_bundle("int4"), "--arm", "llama-1", "--llama-server", server,
        "--llama-rpc", rpc, "--gguf", model, "--channel", "dedicated", "--rtt-ms", "10", "--devices", "1",
        "--prompts", "1", "--no-kill", "--cores", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cores = json.loads((out / "versus.json").read_text())["parameters"]["cores"]
    (own,) = cores["devices"]
    assert {*cores["station"], own} == before
    assert own not in cores["station"]
    for device, expected in (("bs", cores["station"]), ("node0", [own])):
        log = (out / "logs" / "dedicated" / "llama-1" / f"{device}.log").read_text()
        assert log.split("Cpus_allowed_list:")[1].split()[0] == format_ranges(expected)


def test_answers_too_short_to_measure_are_one_line(
    run: Run, tiny_bundle: Callable[[Scheme], Path], tmp_path: Path
) -> None:
    server, model = _stand_in(tmp_path / "server", 1), tmp_path / "model.gguf"
    _write_model(model, tiny_bundle("int4"))
    done = run(
        "testbed", "versus", "--bundle", tiny_bundle("int4"), "--arm", "llama", "--llama-server", server,
        "--gguf", model, "--channel", "dedicated", "--rtt-ms", "10", "--devices", "1", "--prompts", "1",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "no arm made an answer that can be measured: each ended before its second token "
        f"(logs: {tmp_path / 'out' / 'logs'})"
    )
    again = run("testbed", "versus", "--arm", "ours", "--out", tmp_path / "out")
    assert again.returncode == 2
    assert "has the results of another run" in again.stderr
