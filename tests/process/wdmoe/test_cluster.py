"""The public interface on a real broker and node processes."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import wdmoe
from bs_coordinator.errors import PlacementError
from testbed.local_nodes import LocalNodes
from tests.checkpoints import save_mixtral
from tests.waiting import PATIENCE_S, wait_until
from wire.errors import BrokerError, BundleError

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is rain?"}]


@pytest.fixture
def cluster(fleet: LocalNodes) -> Iterator[wdmoe.Cluster]:
    """The two-layer model in fp32 on two nodes, with exact frames."""
    fleet.start("left", "L*:E0-3")
    fleet.start("right", "L*:E4-7")
    with wdmoe.Cluster(fleet.bundle, str(fleet.address), cluster=fleet.cluster, wire="fp32") as cluster:
        yield cluster


def test_answers_are_those_of_transformers(cluster: wdmoe.Cluster, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    plain = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for ids, answer in (
        (plain, cluster.generate(PROMPT, raw=True, max_tokens=8)),
        (chat["input_ids"], cluster.chat(MESSAGES, max_tokens=8)),
        (chat["input_ids"], cluster.generate(MESSAGES[0]["content"], max_tokens=8)),
    ):
        with torch.inference_mode():
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert answer.token_ids == expected
        assert answer.text == "".join(token.text for token in answer.tokens) == str(answer)
        assert answer.stop == "max-tokens"
        assert not answer.degraded
        assert answer.stats.tokens == 8
    for token in answer.tokens:
        parts = (token.trunk_ns, token.network_ns, token.compute_ns, token.wait_ns, token.framing_ns, token.draft_ns)
        assert token.total_ns == sum(parts)
        assert len(token.layer_waits_ns) in (0, 2)  # none of a draft token, which came with the one before it


def test_a_stream_can_be_left_and_policies_take_turns(cluster: wdmoe.Cluster) -> None:
    stream = cluster.stream(PROMPT, raw=True, max_tokens=8000)  # still runs when this thread was paused
    first = next(stream)
    between = cluster.generate(PROMPT, policy="top1", raw=True, max_tokens=2)
    # Another answer with the same policy shares the steps.
    assert cluster.generate(PROMPT, raw=True, max_tokens=1).token_ids == [first.id]
    stream.close()
    assert list(stream) == []
    for token in cluster.stream(MESSAGES, max_tokens=400):
        assert token.stop is None
        break
    # top1 halves the requests of each token: two layers with one expert each, for one token.
    one = cluster.generate(PROMPT, policy="top1", raw=True, max_tokens=2)
    both = cluster.generate(PROMPT, raw=True, max_tokens=2)
    assert sum(one.stats.tokens_by_node.values()) < sum(both.stats.tokens_by_node.values())
    assert (between.token_ids, between.stats.tokens_by_node) == (one.token_ids, one.stats.tokens_by_node)
    with pytest.raises(wdmoe.ConfigError, match="policy 'top3' is unknown"):
        cluster.generate(PROMPT, policy="top3")


def test_threads_share_a_cluster(cluster: wdmoe.Cluster) -> None:
    answers: dict[int, list[int]] = {}
    prompts = [f"{i} and {i} are" for i in range(4)]

    def ask(i: int) -> None:
        answers[i] = cluster.generate(prompts[i], raw=True, max_tokens=6).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    alone = {i: cluster.generate(prompt, raw=True, max_tokens=6).token_ids for i, prompt in enumerate(prompts)}
    assert answers == alone


def test_the_nodes_are_listed_and_a_lost_one_degrades_answers(cluster: wdmoe.Cluster, fleet: LocalNodes) -> None:
    cluster.generate(PROMPT, max_tokens=2)
    nodes = {node.name: node for node in cluster.nodes()}
    assert {name: (node.state, node.held) for name, node in nodes.items()} == {
        "left": ("online", 8), "right": ("online", 8)
    }  # fmt: skip
    assert all(node.link is not None and node.link.rtt_ms > 0 for node in nodes.values())
    fleet.processes["right"].terminate()
    wait_until(lambda: {node.name: node.state for node in cluster.nodes()}["right"] == "lost", "the loss to be seen")
    answer = cluster.generate(PROMPT, raw=True, max_tokens=4)
    assert answer.degraded
    assert answer.tokens[0].degraded


def test_wrong_arguments_are_refused(cluster: wdmoe.Cluster) -> None:
    for wrong, message in (
        (lambda: cluster.generate(" "), "the prompt is empty"),
        (lambda: cluster.chat([]), "the prompt is empty"),
        (lambda: cluster.chat([{"content": "Hello"}]), "^messages: each must be"),
        (lambda: cluster.generate("Hello", raw=True, system="Be kind"), "^system: "),
        (lambda: cluster.generate("Hello", max_tokens=0), "^max_tokens: 0"),
        (lambda: cluster.stream(MESSAGES, raw=True), "^system and raw"),
    ):
        with pytest.raises(wdmoe.ConfigError, match=message):
            wrong()
    with pytest.raises(wdmoe.WdmoeError, match="the model's context is") as caught:
        cluster.generate("one two " * 9000, raw=True)
    assert caught.value.exit_code == 42


def test_missing_experts_are_reported_before_the_deadline(fleet: LocalNodes, tmp_path: Path) -> None:
    at = {"cluster": fleet.cluster, "nodes_timeout": 0.5}
    fleet.start("left", "L*:E0-3")
    with pytest.raises(PlacementError, match="no node holds"):
        wdmoe.generate(PROMPT, fleet.bundle, str(fleet.address), max_tokens=2, **at)
    with pytest.raises(BundleError):
        wdmoe.Cluster(tmp_path, str(fleet.address), **at).open()
    with pytest.raises(BrokerError):
        wdmoe.Cluster(fleet.bundle, "mqtt://127.0.0.1:1", **at).open()


def test_a_local_cluster_leaves_nothing_running(random_bundle: Path, tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    torch_threads = torch.get_num_threads()
    cluster = wdmoe.Cluster.local(random_bundle, nodes=2, logs=tmp_path / "logs")
    assert psutil.Process().children(recursive=True) == before
    try:
        assert cluster.open() is cluster.open()
        drawn = [cluster.generate("Hello", max_tokens=6, temperature=2.0, seed=seed).token_ids for seed in (7, 7, 8)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert [node.name for node in cluster.nodes()] == ["node0", "node1"]
    finally:
        cluster.close()
    children = psutil.Process().children(recursive=True)
    # What renders chat templates is kept for later models.
    assert not [child for child in children if child not in before and "edge_node" in " ".join(child.cmdline())]
    assert torch.get_num_threads() == torch_threads
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["node0.log", "node1.log"]
    with pytest.raises(wdmoe.WdmoeError, match="not open"):
        cluster.nodes()


def test_a_program_that_does_not_close_its_cluster_ends(random_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys, wdmoe\n"
        "cluster = wdmoe.Cluster.local(sys.argv[1], nodes=1).open()\n"
        "print(len(cluster.generate('Hello', max_tokens=1).tokens))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, random_bundle], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_script_without_a_guard_is_told_what_to_write(tmp_path: Path) -> None:
    save_mixtral(tmp_path / "model", "float32", positions=512)
    head = (
        "import pathlib, sys, wdmoe, testbed.demo_assets\n"
        "testbed.demo_assets.demo_model = lambda **_: pathlib.Path(sys.argv[1])  # small, instead of the demo model\n"
    )
    body = (
        "with wdmoe.Cluster.local(nodes=1) as cluster:\n    print(len(cluster.generate('w1', max_tokens=1).tokens))\n"
    )
    done = {}
    for name, lines in (
        ("plain", body), ("guarded", 'if __name__ == "__main__":\n' + textwrap.indent(body, "    ")),
    ):  # fmt: skip
        script = tmp_path / f"{name}.py"
        script.write_text(head + lines)
        done[name] = subprocess.run(
            [sys.executable, script, tmp_path / "model"], capture_output=True, text=True, check=False,
            timeout=PATIENCE_S, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip
    plain, guarded = done["plain"], done["guarded"]
    assert plain.returncode == 1
    assert plain.stderr.splitlines()[-1].startswith("common.config.ConfigError: ")
    assert plain.stderr.count("""write 'if __name__ == "__main__":' above""") == 1
    assert plain.stderr.count("Traceback") == 1
    assert (guarded.returncode, guarded.stdout) == (0, "1\n"), guarded.stderr
