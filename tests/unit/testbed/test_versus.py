"""Arms and their arguments, floors, what follows from answers, and what the command refuses."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from testbed.network.daemon import BASE_STATION
from testbed.network.uniform import Links
from testbed.versus import floors
from testbed.versus.arms import Peers, Place, check_arm, default_arms, make_arm
from testbed.versus.client import chat_request
from testbed.versus.floors import Shape
from testbed.versus.gguf_file import other_shape
from testbed.versus.plot import draw_tpot
from testbed.versus.programs import Memory
from testbed.versus.results import Answer, Failure, Results, Traffic, common_pieces, tables
from tests.gguf_models import write_gguf
from tests.in_process import run_in_process
from wire.broker_address import BrokerAddress
from wire.experts import parse_selector
from wire.manifest import Dims

DIMS = Dims(hidden=576, intermediate=1536, layers=30, experts=8, top_k=2, vocab=49152, max_positions=8192)
DEMO = Shape(hidden=576, layers=30, top_k=2, kv_heads=3)
LLAMA = Peers(llama_server=Path("/l/server"), llama_rpc=Path("/l/rpc"), gguf=Path("/m.gguf"))
DLLAMA = Peers(
    dllama=Path("/d/dllama"), dllama_api=Path("/d/api"), dllama_model=Path("/m.m"), dllama_tokenizer=Path("/m.t")
)
ADDRESSES = {f"node{k}": f"10.77.0.{k + 2}" for k in range(8)}
PLACE = Place(
    bundle=Path("/bundle"), draft_model=Path("/draft"), shape=DEMO, dims=DIMS, addresses=ADDRESSES,
    broker=BrokerAddress("10.77.0.1", 1883), shared_air=False, threads=2, head_threads=3, start_s=60,
)  # fmt: skip


def after(argv: tuple[str, ...], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_our_nodes_share_the_experts_and_each_arm_has_a_cluster_of_its_own() -> None:
    plain, drafts = (make_arm(name, k, PLACE, Peers()) for k, name in enumerate(("ours", "ours-drafts")))
    assert [worker.device for worker in plain.workers] == list(ADDRESSES)
    assert [after(worker.argv, "--experts") for worker in plain.workers] == [f"L0-29:E{k}" for k in range(8)]
    for arm, draft in ((plain, "none"), (drafts, "auto")):
        assert {after(one.argv, "--cluster") for one in (arm.head, *arm.workers)} == {arm.name}
        assert after(arm.head.argv, "--draft") == draft
        assert after(arm.head.argv, "--port") == str(arm.port)
        assert "--shared-air" not in arm.head.argv
    assert after(drafts.head.argv, "--draft-model") == "/draft"
    assert plain.port != drafts.port


def test_slices_of_an_expert_are_on_nodes_of_their_own() -> None:
    dims = msgspec.structs.replace(DIMS, slices=4)
    workers = make_arm("ours", 0, replace(PLACE, dims=dims), Peers()).workers
    held = [parse_selector(after(worker.argv, "--experts"), layers=30, experts=8, slices=4) for worker in workers]
    assert len(held) == 8
    assert {unit for some in held for unit in some} == {(layer, unit) for layer in range(30) for unit in range(32)}
    for some in held:
        assert len(some) == 30 * 4
        assert len({unit // 4 for _, unit in some}) == 4, "never two slices of one expert"


def test_the_trunk_of_our_arms_is_computed_where_the_options_say() -> None:
    place = replace(PLACE, trunk=("--device", "cuda", "--dtype", "bf16"))
    arm = make_arm("ours", 0, place, Peers())
    assert (after(arm.head.argv, "--device"), after(arm.head.argv, "--dtype")) == ("cuda", "bf16")
    assert arm.head.environment["OMP_NUM_THREADS"] == "3"
    assert {after(worker.argv, "--threads") for worker in arm.workers} == {"2"}
    assert "--device" not in make_arm("llama-2", 0, place, LLAMA).head.argv


def test_answers_of_a_fixed_length_are_asked_for_only_where_wanted() -> None:
    assert "ignore_eos" not in chat_request("hello", 5)
    wanted = chat_request("hello", 5, ignore_eos=True)
    assert (wanted["ignore_eos"], wanted["max_tokens"]) == (True, 5)


def test_llama_cpp_has_its_layers_on_as_many_workers_as_the_arm_says() -> None:
    arm = make_arm("llama-4", 3, PLACE, LLAMA)
    assert [worker.device for worker in arm.workers] == ["node0", "node1", "node2", "node3"]
    for worker in arm.workers:
        assert worker.argv[0] == "/l/rpc"
        assert after(worker.argv, "--host") == ADDRESSES[worker.device]
        assert after(worker.argv, "--port") == str(worker.port)
    assert after(arm.head.argv, "--rpc") == ",".join(f"{ADDRESSES[w.device]}:{w.port}" for w in arm.workers)
    assert after(arm.head.argv, "--tensor-split") == "1,1,1,1"
    assert after(arm.head.argv, "--threads") == after(arm.head.argv, "--threads-batch") == "3"
    assert {after(worker.argv, "--threads") for worker in arm.workers} == {"2"}


def test_one_device_alone_has_neither_workers_nor_a_network() -> None:
    arm = make_arm("llama", 0, PLACE, LLAMA)
    assert (arm.workers, arm.head.device) == ((), BASE_STATION)
    assert "--rpc" not in arm.head.argv
    assert arm.floor is not None
    assert arm.floor(Links(5)) == 0


def test_distributed_llama_counts_its_root_among_the_nodes() -> None:
    arm = make_arm("dllama-3", 1, PLACE, DLLAMA)
    assert [worker.device for worker in arm.workers] == ["node0", "node1"]
    assert all(after(worker.argv, "/d/dllama") == "worker" for worker in arm.workers)
    where = arm.head.argv.index("--workers")
    assert list(arm.head.argv[where + 1 :]) == [f"{ADDRESSES[w.device]}:{w.port}" for w in arm.workers]
    assert "--workers" not in make_arm("dllama-1", 1, PLACE, DLLAMA).head.argv


def test_arms_follow_from_the_files_that_are_named() -> None:
    assert default_arms(Peers(), DEMO, 8) == ["ours", "ours-drafts", "ours-fast"]
    assert default_arms(LLAMA, DEMO, 4) == ["ours", "ours-drafts", "ours-fast", "llama", "llama-2", "llama-4"]
    assert default_arms(DLLAMA, DEMO, 8)[3:] == ["dllama-3"]
    assert default_arms(DLLAMA, DEMO, 1)[3:] == ["dllama-2"]


@pytest.mark.parametrize("rtt_ms", [2.0, 5.0, 10.0])
def test_floors_are_those_of_the_comparison(rtt_ms: float) -> None:
    links = Links(rtt_ms)
    # A hidden state of 576 values takes 0.092 ms in fp16, 0.184 in fp32 and 0.049 in blocks of 8 bits.
    ours = make_arm("ours", 0, PLACE, Peers()).floor
    assert ours is not None
    assert 30 * (rtt_ms + 0.184) < ours(links) < 30 * (rtt_ms + 0.22)
    assert floors.pipeline(DEMO, 8)(links) == pytest.approx(8 * (rtt_ms + 0.369), rel=1e-3)
    assert floors.tensor_parallel(DEMO, 3)(links) == pytest.approx(60 * (rtt_ms + 3 * 0.049) + rtt_ms, rel=1e-3)
    assert floors.tensor_parallel(DEMO, 1)(links) == 0


def test_on_a_shared_channel_messages_take_turns_and_a_pipeline_waits_no_longer() -> None:
    own, shared = Links(5), Links(5, shared_air=True)
    assert floors.experts(DEMO, 8, 1000, 250)(own) == pytest.approx(30 * (5 + 0.1))
    assert floors.experts(DEMO, 8, 1000, 250)(shared) == pytest.approx(30 * (5 + 0.2))
    assert floors.experts(DEMO, 1, 1000, 250)(shared) == pytest.approx(30 * (5 + 0.1))
    slices = DEMO._replace(slices=4)
    assert floors.experts(slices, 8, 1000, 250)(own) == pytest.approx(30 * (5 + 0.1))
    assert floors.experts(slices, 8, 1000, 250)(shared) == pytest.approx(30 * (5 + 0.8))
    assert floors.pipeline(DEMO, 4)(own) == floors.pipeline(DEMO, 4)(shared)
    # Root and two workers: two messages down, two up, and one each way between the workers on two links each.
    assert floors.tensor_parallel(DEMO, 3)(shared) == pytest.approx(60 * (5 + 8 * 0.04896) + 5)


def answer(arm: str, pieces: list[str], at_ms: list[float], **fields: object) -> Answer:
    defaults = {
        "profile": "p", "prompt": 0, "outcome": "finished", "why": "", "said_tokens": None, "prompt_tokens": 9,
        "traffic": Traffic(),
    }  # fmt: skip
    return Answer(arm=arm, pieces=pieces, at_ms=at_ms, **{**defaults, **fields})  # type: ignore[arg-type]


def test_times_and_traffic_per_token_are_of_the_tokens_after_the_first() -> None:
    traffic = Traffic(7000, 3000, 40, 20).since(Traffic(1000, 1000, 10, 10))
    ours = answer("ours", ["a", "b", "c"], [100, 120, 160], traffic=traffic)
    assert (ours.gaps_ms, ours.tpot_ms) == ([20, 40], 30)
    results = Results({}, ["ours"], {"p": {"ours": 25.0}}, [ours])
    row = tables(results).splitlines()[4]
    # 3 tokens in 160 ms; 6000 bytes down and 2000 up, 30 frames down and 10 up, for two tokens.
    assert row == "| ours | 100 | 30.0 | 25 | 39.0 | 18.8 | 3.00 | 1.00 | 15 | 5 |  | 1 |"


def test_tokens_are_counted_as_the_head_counts_them_where_it_does() -> None:
    traffic = Traffic(6000, 2000, 30, 10)
    # Pieces that hold several tokens each: 5 in all, 4 after the first.
    said = answer("ours", ["a b", "c d", "e"], [100, 120, 160], said_tokens=5, traffic=traffic)
    row = tables(Results({}, ["ours"], {"p": {}}, [said])).splitlines()[4]
    assert row == "| ours | 100 | 15.0 |  | 39.0 | 31.2 | 1.50 | 0.50 | 8 | 2 |  | 1 |"
    assert not answer("ours", ["a", "b"], [1, 2], said_tokens=1).complete
    assert not answer("ours", ["a b"], [1], said_tokens=2).complete


def test_an_arm_that_needs_no_network_is_not_taken_for_a_distributed_one() -> None:
    arms = ["ours", "ours-fast", "some", "llama-2"]
    local = {"ours": (0, 240), "ours-fast": (240, 240), "some": (60, 240)}
    results = Results({}, arms, {"p": {}}, local_experts=local, rest_bytes_per_s={"p": 1500})
    rows = tables(results).splitlines()
    titles = ["| ours", "| ours-fast (all experts local)", "| some", "| llama-2"]
    assert [row.split(" | ")[0] for row in rows[4:8]] == titles
    assert [row.split(" | ")[0] for row in rows[11:15]] == titles
    assert [row.split(" | ")[5] for row in rows[11:15]] == ["none", "240 of 240", "60 of 240", ""]
    assert rows[-1] == "p: all arms together send 1.5 kB/s at rest, which is part of every arm's traffic."


def test_texts_are_compared_by_what_they_begin_with_however_they_are_cut() -> None:
    one = answer("x", ["The ", "cap", "ital", " is"], [1, 2, 3, 4])
    assert common_pieces(one, answer("y", ["The", " capital", " of"], [1, 2, 3])) == 3
    assert common_pieces(one, answer("y", ["The ", "cat"], [1, 2])) == 1
    assert common_pieces(one, one) == 4
    assert common_pieces(one, answer("y", [], [])) == 0


def test_arms_that_fail_or_lose_a_device_are_rows_that_say_so() -> None:
    answers = [
        answer("ours", ["a", "b"], [1, 2]),
        answer("ours", ["a", "b"], [1, 9], killed="node0", outcome="degraded", why="1 of 2 tokens"),
        answer("llama-2", ["a"], [1], killed="node0", outcome="aborted", why="connection lost"),
    ]
    memory = {"ours": [Memory("bs", 3_000_000, 2_000_000), Memory("n", 1_000_000, 0), Memory("m", 4_000_000, 1)]}
    failures = [Failure("llama-8", "p", "bs: ended with exit code 1; last line: a | b")]
    arms = ["ours", "llama-2", "llama-8"]
    text = tables(Results({}, arms, {"p": dict.fromkeys(arms)}, answers, failures, memory))
    assert "| ours | 3 | 2 | 4 | 0 |  | degraded: 1 of 2 tokens |" in text
    assert "| llama-2 |  |  |  |  |  | aborted after 1 tokens: connection lost |" in text
    assert "failed: bs: ended with exit code 1; last line: a \\| b |" in text
    # The answer during which a device was killed counts for no time.
    assert "| ours | 1 | 1.0 |" in text


def test_the_plot_has_a_panel_for_each_channel_and_only_arms_that_answered(tmp_path: Path) -> None:
    links = [Links(10), Links(2), Links(2, shared_air=True)]
    answers = [answer("ours", ["a", "b"], [1, 9], profile=one.profile) for one in links[:2]]
    floors_ms = {one.profile: {"ours": 7.0, "llama-2": None} for one in links}
    draw_tpot(Results({}, ["ours", "llama-2"], floors_ms, answers), links, tmp_path / "plot.svg")
    svg = (tmp_path / "plot.svg").read_text()
    assert "<!-- a link for each device -->" in svg
    assert "<!-- one channel for all -->" in svg
    assert "<!-- ours -->" in svg
    assert "<!-- llama-2 -->" not in svg


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--llama-server", "no/such/file"), "File 'no/such/file' does not exist"),
        (("--llama-server", __file__), "is not executable"),
        (("--gguf", "no.gguf"), "File 'no.gguf' does not exist"),
        (("--gguf", __file__), "is no GGUF file, or is damaged: it does not begin with GGUF"),
        (("--arm", "llama-2"), "the arm 'llama-2' needs --llama-server and --gguf and --llama-rpc"),
        (("--arm", "dllama-3"), "the arm 'dllama-3' needs --dllama and --dllama-api"),
        (("--prompt", " "), "--prompt: it is empty"),
        (("--dtype", "fp64"), "'fp64' is not one of 'fp32', 'bf16', 'fp16'"),
        (("--arm", "exo"), "'exo' is no arm: use ours, ours-drafts"),
        (("--arm", "llama-0"), "'llama-0' is no arm"),
    ],
)
def test_what_can_not_be_run_is_one_line_and_a_malformed_command(arguments: tuple[str, ...], says: str) -> None:
    done = run_in_process("testbed", "versus", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_gguf_file_of_another_shape_is_found(tmp_path: Path) -> None:
    for number, (hidden, experts, top_k, difference) in enumerate(
        (
            (64, 8, 2, ""),
            (32, 8, 2, "32 values per hidden state instead of 64"),
            (64, 16, 2, "16 experts per layer instead of 8"),
            (64, 8, 4, "4 experts per token instead of 2"),
        )
    ):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, hidden=hidden, experts=experts, top_k=top_k)
        assert other_shape(path, msgspec.structs.replace(DIMS, hidden=64)) == difference


def test_too_few_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.node_shares.read_siblings", lambda: [[0, 2], [1, 3]])
    done = run_in_process("testbed", "versus", "--cores", "--devices", "4")
    assert done.returncode == 2
    assert "--cores needs a core for each of 4 devices and one more, there are 4" in done.stderr
    assert done.stderr.count("\n") == 1


def test_more_workers_than_devices_are_refused() -> None:
    check_arm("llama-2", LLAMA, 2)
    check_arm("dllama-3", DLLAMA, 2)
    with pytest.raises(ValueError, match="needs 4 devices besides the base station, there are 2"):
        check_arm("llama-4", LLAMA, 2)
