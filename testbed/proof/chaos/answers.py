"""Makes one answer with a base station in a process of its own, under faults, and judges it."""

import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from bs_coordinator.broker.processes import die_with_parent
from common.jsonl import read_json_lines
from testbed.proof.chaos.schedule import Fault
from testbed.proof.chaos.system import TestSystem

Outcome = Literal["right", "degraded", "failed", "wrong", "hung", "crashed"]
DEADLINE_S = 150.0
"""Longer than all timeouts of the base station: 60 s for a broker and 12 s for its nodes, twice."""
_POLL_S = 0.01


class JudgedAnswer(Struct, frozen=True, kw_only=True):
    """Outcome of one answer.

    Attributes:
        number: number of the answer in the run.
        prompt: number of its prompt.
        faults: faults during the answer.
        outcome: `right`: the same tokens as without faults. `degraded`: complete, and reported as degraded. `failed`:
            ended with one line of error. `wrong`: other tokens without a report. `hung`: did not end. `crashed`: a
            traceback, a signal, or a fault that did not work.
        seconds: duration.
        longest_pause_s: longest time between two tokens.
        tokens: number of tokens.
        resumed: how often the base station was killed and resumed the answer.
        detail: the error line.
    """

    number: int
    prompt: int
    faults: list[Fault]
    outcome: Outcome
    seconds: float
    longest_pause_s: float
    tokens: int
    resumed: int
    detail: str = ""


def make_answer(
    system: TestSystem, bundle: Path, folder: Path, *, number: int, prompt: int, text: str, tokens: int,
    faults: Sequence[Fault], expected: list[int] | None, seed: int,
) -> JudgedAnswer:  # fmt: skip
    """Start a base station, inject faults, and judge the answer.

    Args:
        expected: token ids of the answer without faults; None to make that answer.
        seed: seeds what the faults do.
    """
    session = folder / f"answer-{number}.jsonl"
    session.unlink(missing_ok=True)
    link_log = ["--link-log", "/dev/full"] if any(f.kind == "disk" for f in faults) else []
    argv = [
        sys.executable, "-m", "bs_coordinator", "generate", "--bundle", str(bundle), "--broker", str(system.address),
        "--cluster", "chaos", "--prompt", text, "--raw", "--wire", "fp32", "--max-tokens", str(tokens),
        "--session", str(session), *link_log,
        # The emulated network stays on this machine.
        *([] if system.address.on_loopback else ["--allow-plaintext"]),
    ]  # fmt: skip
    argv = die_with_parent(argv)
    waiting = list(faults)
    running: list[Future[None]] = []
    began = changed = time.monotonic()
    count, longest_s, resumed = 0, 0.0, 0
    with (folder / f"answer-{number}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
        hung = False
        while True:
            now = time.monotonic()
            if now - began > DEADLINE_S:
                hung = True
                process.kill()
            if (found := _count(session)) > count:
                if count:
                    longest_s = max(longest_s, now - changed)
                count, changed = found, now
            for fault in [f for f in waiting if count >= f.after_tokens]:
                waiting.remove(fault)
                if fault.kind == "base-station":
                    process.kill()
                    process.wait()
                    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)
                    resumed += 1
                else:
                    rng = random.Random(f"{seed} {number} {fault.kind}")  # noqa: S311 - to be reproduced
                    running.append(system.begin(fault, rng))
            if process.poll() is not None:
                break
            time.sleep(_POLL_S)
    done, unfinished = wait(running, 30.0)
    errors = [str(error) for future in done if (error := future.exception())]
    errors += ["a fault did not end"] * len(unfinished)
    log_text = (folder / f"answer-{number}.log").read_text(encoding="utf-8", errors="replace")
    ids = _ids(session)
    outcome, detail = _judge(process.returncode, log_text, ids, expected, hung=hung)
    if errors:
        outcome, detail = "crashed", f"fault: {errors[0]}"
    return JudgedAnswer(
        number=number, prompt=prompt, faults=list(faults), outcome=outcome, seconds=time.monotonic() - began,
        longest_pause_s=longest_s, tokens=len(ids), resumed=resumed, detail=detail,
    )  # fmt: skip


def _judge(code: int, log: str, ids: list[int], expected: list[int] | None, *, hung: bool) -> tuple[Outcome, str]:
    lines = [line for line in log.splitlines() if re.search(r"\berror: ", line)]
    if hung:
        return "hung", log.strip().splitlines()[-1] if log.strip() else ""
    if code < 0 or "Traceback" in log or (code > 0 and len(lines) != 1):
        return "crashed", f"exit code {code}"
    if code > 0:
        return "failed", f"{code}: {lines[0]}"
    if re.search(r"degraded: \d+ of", log):
        return "degraded", ""
    return ("right", "") if expected is None or ids == expected else ("wrong", "")


def _count(session: Path) -> int:
    try:
        return max(0, session.read_bytes().count(b"\n") - 1)
    except OSError:
        return 0


def _ids(session: Path) -> list[int]:
    # The first line is an object, the question; the last line may be incomplete.
    lines = read_json_lines(session, msgspec.json.Decoder(tuple[int, bool] | dict[str, object]).decode, skip_cut=True)
    try:
        return [line[0] for line in lines if isinstance(line, tuple)]
    except OSError:
        return []


def session_ids(folder: Path, number: int) -> list[int]:
    """Token ids of an answer in `folder`."""
    return _ids(folder / f"answer-{number}.jsonl")
