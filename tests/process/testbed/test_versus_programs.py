"""Programs that `versus` runs and asks: one that answers as llama-server does, and ones that crash, hang or refuse."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bs_coordinator.broker.processes import free_port
from common.errors import WdmoeError
from testbed.versus.arms import Arm, Program
from testbed.versus.client import Account, AnswerEndedError, Piece, chat_request, local_experts, stream_answer
from testbed.versus.programs import RunningArm, last_line
from tests.waiting import PATIENCE_S

Start = Callable[..., RunningArm]


def _head(port: int, behaviour: str, tokens: int) -> Program:
    script = Path(__file__).parents[2] / "stand_in_head.py"
    return Program("bs", (sys.executable, str(script), str(port), behaviour, str(tokens)))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(behaviour)`: an arm of stand-ins, which ends with the test."""
    with ExitStack() as stack:

        def start(behaviour: str, *, tokens: int = 5) -> RunningArm:
            port, worker_port = free_port("127.0.0.1"), free_port("127.0.0.1")
            worker = _head(worker_port, "finish", 1)._replace(device="node0", port=worker_port)
            arm = Arm("stand-in", (worker,), _head(port, behaviour, tokens), port, "/health", None)
            running = RunningArm(arm, lambda device: (), tmp_path / "logs", 1)
            stack.callback(running.stop)
            running.start(PATIENCE_S)
            return running

        yield start


def _ask(running: RunningArm, account: Account, *, deadline_s: float = PATIENCE_S) -> list[Piece]:
    request = chat_request("one two three", 5)
    return list(stream_answer(running.arm.port, request, account, deadline_s=deadline_s))


@pytest.mark.parametrize("behaviour", ["finish", "no-break"])
def test_an_answer_arrives_piece_by_piece(start: Start, behaviour: str) -> None:
    account = Account()
    pieces = _ask(start(behaviour), account)
    assert [piece.text for piece in pieces] == [" one", " two", " three", " one", " two"]
    assert [piece.at_s for piece in pieces] == sorted(piece.at_s for piece in pieces)
    assert (account.tokens, account.prompt_tokens, account.degraded_tokens) == (5, 3, 0)


def test_a_head_that_aborts_is_told_from_one_that_is_silent_and_leaves_its_last_words(start: Start) -> None:
    running = start("abort")
    with pytest.raises(AnswerEndedError) as ended:
        _ask(running, Account())
    assert ended.value.outcome == "aborted"
    assert running.last_words(wait_s=PATIENCE_S) == "ended with exit code -6; last line: GGML_ASSERT(status) failed"


def test_a_silent_head_counts_as_hung_after_the_deadline(start: Start) -> None:
    with pytest.raises(AnswerEndedError, match=r"silent for 0\.5 s") as ended:
        _ask(start("hang"), Account(), deadline_s=0.5)
    assert ended.value.outcome == "hung"


@pytest.mark.parametrize(
    ("behaviour", "outcome", "why"), [("refuse", "refused", "status 500: "), ("error", "aborted", "Compute error")]
)
def test_what_a_head_says_of_its_failure_is_passed_on(start: Start, behaviour: str, outcome: str, why: str) -> None:
    with pytest.raises(AnswerEndedError, match=why) as ended:
        _ask(start(behaviour), Account())
    assert ended.value.outcome == outcome


def test_a_head_that_does_not_say_how_many_experts_it_keeps_is_not_taken_for_ours(start: Start) -> None:
    with pytest.raises(AnswerEndedError, match="don't say how many experts") as ended:
        local_experts(start("finish").arm.port, 1, deadline_s=PATIENCE_S)
    assert ended.value.outcome == "refused"


def test_memory_is_by_device_and_a_killed_device_has_none(start: Start) -> None:
    running = start("finish")
    head, worker = running.memory()
    assert (head.device, worker.device) == ("bs", "node0")
    assert all(4e6 < one.pss_bytes <= one.peak_rss_bytes for one in (head, worker))
    running.kill("node0")
    assert running.memory()[1].peak_rss_bytes == 0
    assert len(_ask(running, Account())) == 5


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("print('no such file'); raise SystemExit(3)", "bs: ended with exit code 3; last line: no such file"),
        ("import time; print('loading', flush=True); time.sleep(600)", "bs: not ready after 2 s; last line: "),
    ],
)
def test_a_head_that_is_never_ready_is_one_line_with_its_last_words(tmp_path: Path, code: str, says: str) -> None:
    port = free_port("127.0.0.1")
    arm = Arm("broken", (), Program("bs", (sys.executable, "-c", code)), port, "/health", None)
    start_s = 2 if "sleep" in code else PATIENCE_S
    running = RunningArm(arm, lambda device: (), tmp_path, 1)
    with pytest.raises(WdmoeError) as failed:
        running.start(start_s)
    running.stop()
    assert str(failed.value).startswith(says)


def test_a_program_of_another_machine_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755)
    arm = Arm("foreign", (), Program("bs", (str(program),)), free_port("127.0.0.1"), "/health", None)
    with pytest.raises(WdmoeError):
        RunningArm(arm, lambda device: (), tmp_path, 1).start(PATIENCE_S)


def test_the_last_line_is_the_last_that_is_not_empty(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"")
    assert last_line(log) == "no output"
    log.write_bytes(b"x" * 20_000 + b"\n  end \xff \n\n")
    assert last_line(log) == "end \ufffd"
