"""Chat answers with drafts compared with the same answers without, on an emulated network with round trips of 5 ms.

On eight nodes with one expert per layer, and on four with two: draft tokens need more experts, which means more
messages on eight nodes than on four. Answers take seconds each; they are kept in a `sample_log`, and an interrupted
benchmark continues.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from msgspec import Struct

from bs_coordinator.base_station import BaseStation
from bs_coordinator.config import DraftMode, SamplingConfig
from bs_coordinator.engine.answer_stats import summarise
from bs_coordinator.engine.sequence import Sequence
from bs_coordinator.engine.speculation import Speculation
from testbed.bench.chat_prompts import CHAT_PROMPTS
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.sample_log import sample_log
from testbed.bench.system import running, why_not
from testbed.demo_assets import demo_bundle, demo_draft
from testbed.network.uniform import Links

RTT_MS = 5.0
EIGHT = {f"node{k}": f"L*:E{k}" for k in range(8)}
_FOUR = {f"node{k}": f"L*:E{k},{k + 4}" for k in range(4)}

Arm = Literal["none", "auto", "auto, one choice", "auto, one choice, not read ahead"]
_MODES: dict[Arm, DraftMode] = {
    "none": "none", "auto": "auto", "auto, one choice": "auto", "auto, one choice, not read ahead": "auto"
}  # fmt: skip
_ARMS = tuple(_MODES)
_MAX_TOKENS = 40
_WARM_UP_TOKENS = 8


class _MeasuredAnswer(Struct, frozen=True, kw_only=True):
    """One measured answer.

    Attributes:
        arm: kind of draft; with `one choice`, no other tokens are tried in place of draft tokens; with
            `not read ahead`, the draft model is idle while nodes are awaited.
        prompt: index in `CHAT_PROMPTS`.
        ids: token ids.
        tpot_ms: TPOT: wall-clock time per token after the first.
        wall_s: wall-clock time of the whole answer, including the prompt.
        ttft_ms: TTFT: time to the first token.
        steps, drafted, accepted: numbers of decode steps, draft tokens and accepted draft tokens.
        draft_ms: drafting time per token.
    """

    arm: Arm
    prompt: int
    ids: list[int]
    tpot_ms: float
    wall_s: float
    ttft_ms: float
    steps: int
    drafted: int
    accepted: int
    draft_ms: float


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per number of nodes and kind of draft; each prompt is answered with all kinds, in changing order."""
    for nodes in (EIGHT, _FOUR):
        name = f"chat answers with drafts, {RTT_MS:g} ms, {len(nodes)} nodes"
        if why := why_not():
            yield Skipped(name, why)
            continue
        done = _answers(settings, nodes)
        for arm in _ARMS[1:]:
            yield _row(f"{name}, {arm}", [(done[n, arm], done[n, "none"]) for n, a in sorted(done) if a == arm])


def _answers(settings: Settings, nodes: Mapping[str, str]) -> dict[tuple[int, Arm], _MeasuredAnswer]:
    with (
        sample_log(settings.folder, f"answers-{len(nodes)}-{settings.device}", _MeasuredAnswer) as log,
        open_site(settings, nodes) as station,
    ):
        done = {(answer.prompt, answer.arm): answer for answer in log.samples}
        shared = {
            arm: station.speculation.restarted(
                mode, read_ahead="not read ahead" not in arm, branching="one choice" not in arm
            )
            for arm, mode in _MODES.items()
        }
        for arm in _ARMS:
            _answer(station, arm, -1, "Say hello.", shared[arm], _WARM_UP_TOKENS)
        for number, prompt in enumerate(CHAT_PROMPTS[: settings.samples]):
            turn = number % len(_ARMS)
            for arm in _ARMS[turn:] + _ARMS[:turn]:
                if (number, arm) not in done:
                    answer = done[number, arm] = _answer(station, arm, number, prompt, shared[arm], _MAX_TOKENS)
                    log.add(answer)
            settings.console.print(_line(prompt, [done[number, arm] for arm in _ARMS]), style="dim", highlight=False)
    return done


@contextmanager
def open_site(settings: Settings, nodes: Mapping[str, str]) -> Iterator[BaseStation]:
    """A base station with nodes on dedicated links.

    Args:
        settings: settings of the benchmark.
        nodes: experts by node.
    """
    bundle, draft = demo_bundle("int4", console=settings.console), demo_draft(console=settings.console)
    with running(settings, bundle, nodes=nodes, links=[Links(RTT_MS)], draft="auto", draft_model=draft) as system:
        system.station.dispatcher.measure_links(1.0)
        yield system.station


def _answer(
    station: BaseStation, arm: Arm, number: int, prompt: str, speculation: Speculation, max_tokens: int
) -> _MeasuredAnswer:
    ids = station.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    sequence = Sequence(station.model, station.tokenizer, speculation=speculation)
    began = time.perf_counter()
    first_s = 0.0
    events = []
    for event in sequence.generate(ids, SamplingConfig(max_tokens=max_tokens)):
        first_s = first_s or time.perf_counter() - began
        events.append(event)
    wall_s = time.perf_counter() - began
    stats = summarise(events)
    return _MeasuredAnswer(
        arm=arm,
        prompt=number,
        ids=[event.id for event in events],
        tpot_ms=1e3 * (wall_s - first_s) / max(1, len(events) - 1),
        wall_s=wall_s,
        ttft_ms=1e3 * first_s,
        steps=stats.steps,
        drafted=stats.drafted,
        accepted=stats.accepted,
        draft_ms=stats.draft_ms,
    )


def _line(prompt: str, answers: list[_MeasuredAnswer]) -> str:
    plain, *others = answers
    arms = ", ".join(f"{a.arm} ×{plain.tpot_ms / a.tpot_ms:.2f} ({a.accepted}/{a.drafted})" for a in others)
    return f"{prompt.partition(chr(10))[0][:50]:<50} {len(plain.ids)} tokens, plain {plain.tpot_ms:.0f} ms: {arms}"


def _row(name: str, pairs: list[tuple[_MeasuredAnswer, _MeasuredAnswer]]) -> Row:
    """A row from pairs of answers with and without drafts."""
    # An answer of a single token has no decode steps.
    decoded = [(ours, plain) for ours, plain in pairs if len(plain.ids) > 1]
    speedups = [plain.tpot_ms / ours.tpot_ms for ours, plain in decoded]
    whole = [plain.wall_s / ours.wall_s for ours, plain in decoded]
    parameters = {
        "prompts": len(decoded),
        "max_tokens": _MAX_TOKENS,
        "rtt_ms": RTT_MS,
        "speedup_mean": statistics.mean(speedups),
        "speedup_least": min(speedups),
        "speedup_whole_answer_mean": statistics.mean(whole),
        "speedup_whole_answer_least": min(whole),
        "identical": sum(ours.ids == plain.ids for ours, plain in pairs),
        "compared": len(pairs),
        "draft_ms_per_token": statistics.mean(a.draft_ms for a, _ in decoded),
        "tokens_per_step": sum(len(a.ids) - 1 for a, _ in decoded) / sum(a.steps for a, _ in decoded),
        "speedups": speedups,
        "texts": [CHAT_PROMPTS[ours.prompt] for ours, _ in decoded],
    }
    ours_ms, plain_ms = [a.tpot_ms for a, _ in decoded], [b.tpot_ms for _, b in decoded]
    return Row(name, "plain decoding", ours_ms, plain_ms, 1 / 3 if name.endswith(", auto") else None, parameters)
