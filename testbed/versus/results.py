"""Answers of all arms, and what follows from them: JSON with every sample, tables in Markdown. Pure but for writing."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from common.files import atomic_write
from testbed import facts
from testbed.versus.programs import Memory

SCHEMA = 1
RESULTS = "versus.json"


class Traffic(Struct, frozen=True):
    """What crossed all links in both directions."""

    down_bytes: int = 0
    up_bytes: int = 0
    down_frames: int = 0
    up_frames: int = 0

    def since(self, earlier: "Traffic") -> "Traffic":
        """Traffic between two moments."""
        return Traffic(
            self.down_bytes - earlier.down_bytes, self.up_bytes - earlier.up_bytes,
            self.down_frames - earlier.down_frames, self.up_frames - earlier.up_frames,
        )  # fmt: skip


class Answer(Struct, frozen=True, kw_only=True):
    """One measured answer.

    Attributes:
        profile: of the links.
        prompt: index of the prompt.
        outcome: `finished`, `degraded`, `refused`, `aborted` or `hung`.
        why: what the head said, if it did not finish.
        pieces: text as it arrived, usually a token each.
        at_ms: when each piece arrived, after the request was sent.
        said_tokens: tokens of the answer, as the head counts them; None if it does not say.
        prompt_tokens: the same of the prompt.
        traffic: between the first piece and the last.
        killed: device whose programs were killed during the answer; empty for none.
    """

    arm: str
    profile: str
    prompt: int
    outcome: str
    why: str
    pieces: list[str]
    at_ms: list[float]
    said_tokens: int | None
    prompt_tokens: int | None
    traffic: Traffic
    killed: str = ""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    @property
    def tokens(self) -> int:
        """Tokens of the answer, which need not be as many as pieces; without the head's count, each piece is one."""
        return self.said_tokens or len(self.pieces)

    @property
    def complete(self) -> bool:
        """Whether it reached its end, with at least two tokens to measure."""
        return self.outcome in ("finished", "degraded") and min(self.tokens, len(self.pieces)) > 1

    @property
    def gaps_ms(self) -> list[float]:
        """ITL: times between pieces."""
        return np.diff(self.at_ms).tolist()

    @property
    def tpot_ms(self) -> float:
        """TPOT: mean time per token after the first, of a complete answer."""
        return (self.at_ms[-1] - self.at_ms[0]) / (self.tokens - 1)


class Failure(Struct, frozen=True):
    """An arm that did not start, or that was given up after an answer."""

    arm: str
    profile: str
    why: str


class Results(Struct):
    """Everything measured so far.

    Attributes:
        floors_ms: by profile, then arm; None where an arm has no floor.
        memory: by arm.
        rest_bytes_per_s: traffic of all arms together at rest, by profile.
        local_experts: how many experts the base station keeps, and how many there are, by arm of ours.
    """

    parameters: dict[str, Any]
    arms: list[str]
    floors_ms: dict[str, dict[str, float | None]] = {}
    answers: list[Answer] = []
    failures: list[Failure] = []
    memory: dict[str, list[Memory]] = {}
    rest_bytes_per_s: dict[str, float] = {}
    local_experts: dict[str, tuple[int, int]] = {}

    def title(self, arm: str) -> str:
        """An arm's name, which says so if it needs no network because all experts are on the base station."""
        here, every = self.local_experts.get(arm, (0, 0))
        return f"{arm} (all experts local)" if here and here == every else arm

    def of(self, profile: str, arm: str) -> list[Answer]:
        """Complete answers of an arm, without those during which a device was killed."""
        chosen = (a for a in self.answers if (a.profile, a.arm) == (profile, arm))
        return [answer for answer in chosen if answer.complete and not answer.killed]

    def tpot_ms(self, profile: str, arm: str) -> float | None:
        """Median TPOT of an arm; None if it made no answer."""
        answers = self.of(profile, arm)
        return statistics.median(answer.tpot_ms for answer in answers) if answers else None


def write_results(results: Results, folder: Path) -> None:
    """Write `versus.json` with every sample and `versus.md` with the tables."""
    document = {**facts.result_header(SCHEMA), **msgspec.to_builtins(results)}
    with atomic_write(folder / RESULTS) as file:
        file.write(json.dumps(document).encode())
    with atomic_write(folder / "versus.md") as file:
        file.write(tables(results).encode())


def tables(results: Results) -> str:
    """All tables: one per profile, and one of memory and of killed devices."""
    parts = [f"{profile}:\n\n{_speeds(results, profile)}" for profile in results.floors_ms]
    parts.append(_devices(results))
    parts += [
        f"{profile}: all arms together send {bytes_per_s / 1e3:.1f} kB/s at rest, which is part of every arm's traffic."
        for profile, bytes_per_s in results.rest_bytes_per_s.items()
    ]
    return "\n\n".join(parts) + "\n"


def _speeds(results: Results, profile: str) -> str:
    header = (
        "arm", "TTFT, ms", "TPOT, ms", "floor", "p95 of ITL, ms", "tokens/s", "down, kB/token", "up",
        "down, frames/token", "up", f"as {results.arms[0]}", "answers",
    )  # fmt: skip
    rows: list[Sequence[str]] = []
    for arm in results.arms:
        answers = results.of(profile, arm)
        floor = results.floors_ms[profile].get(arm)
        rows.append((results.title(arm), *_cells(answers, floor), _same(results, profile, arm), str(len(answers))))
    return markdown(header, rows)


def _cells(answers: Sequence[Answer], floor_ms: float | None) -> list[str]:
    floor = "" if floor_ms is None else f"{floor_ms:.0f}"
    if not answers:
        return ["", "", floor, *[""] * 6]
    later = sum(answer.tokens - 1 for answer in answers)
    traffic = [sum(getattr(answer.traffic, field) for answer in answers) / later for field in Traffic.__struct_fields__]
    gaps = [gap for answer in answers for gap in answer.gaps_ms]
    return [
        f"{statistics.median(answer.at_ms[0] for answer in answers):.0f}",
        f"{statistics.median(answer.tpot_ms for answer in answers):.1f}",
        floor,
        f"{np.quantile(gaps, 0.95):.1f}",
        f"{1e3 * sum(a.tokens for a in answers) / sum(a.at_ms[-1] for a in answers):.1f}",
        f"{traffic[0] / 1e3:.2f}", f"{traffic[1] / 1e3:.2f}", f"{traffic[2]:.0f}", f"{traffic[3]:.0f}",
    ]  # fmt: skip


def _same(results: Results, profile: str, arm: str) -> str:
    """Pieces that begin all answers of an arm as those of the first arm do, of all pieces."""
    if arm == results.arms[0]:
        return ""
    first = {answer.prompt: answer for answer in results.of(profile, results.arms[0])}
    pairs = [(first[a.prompt], a) for a in results.of(profile, arm) if a.prompt in first]
    return f"{sum(common_pieces(*pair) for pair in pairs)} of {sum(len(a.pieces) for a, _ in pairs)}" if pairs else ""


def common_pieces(one: Answer, other: Answer) -> int:
    """Pieces of `one` that lie within the beginning that both texts have in common."""
    common = next((i for i, (a, b) in enumerate(zip(one.text, other.text, strict=False)) if a != b), None)
    length = min(len(one.text), len(other.text)) if common is None else common
    ends = np.cumsum([len(piece) for piece in one.pieces])
    return int((ends <= length).sum())


def _devices(results: Results) -> str:
    header = (
        "arm", "base station: peak RSS, MB", "PSS", "largest device: peak RSS, MB", "PSS",
        "experts on the base station", "when a device is killed",
    )  # fmt: skip
    killed = {answer.arm: answer for answer in results.answers if answer.killed}
    failed = {failure.arm: failure.why for failure in results.failures}
    rows = []
    for arm in results.arms:
        memory = results.memory.get(arm, [])
        largest = sorted(memory[1:], key=lambda one: one.peak_rss_bytes)[-1:]
        outcome = _outcome(killed[arm]) if arm in killed else f"failed: {failed[arm]}" if arm in failed else ""
        rows.append((results.title(arm), *_megabytes(memory[:1]), *_megabytes(largest), _local(results, arm), outcome))
    return markdown(header, rows)


def _local(results: Results, arm: str) -> str:
    """Experts of an arm of ours that need no network; empty for other programs."""
    if arm not in results.local_experts:
        return ""
    here, every = results.local_experts[arm]
    return f"{here} of {every}" if here else "none"


def _megabytes(memory: Iterable[Memory]) -> list[str]:
    return [f"{bytes_ / 1e6:.0f}" for one in memory for bytes_ in (one.peak_rss_bytes, one.pss_bytes)] or ["", ""]


def _outcome(answer: Answer) -> str:
    if answer.outcome == "degraded":
        return f"degraded: {answer.why}"
    return f"{answer.outcome} after {answer.tokens} tokens" + (f": {answer.why}" if answer.why else "")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first and the last are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
