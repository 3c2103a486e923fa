"""Decoding the demo model on dedicated links, token by token, compared with the floor."""

import statistics
from collections.abc import Callable, Iterator

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.step_records import StepRecord
from testbed.bench.alone import Parts
from testbed.bench.floor import FloorLink, causes_ms, floor_ms
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.system import System, running, why_not
from testbed.demo_assets import demo_bundle
from testbed.network.uniform import DEDICATED_MBPS, Links
from testbed.prompts import PROMPTS

RTTS_MS = (2.0, 5.0, 10.0)
NODES = {f"node{k}": f"L*:E{k}" for k in range(8)}
TARGET = 1.15
_ROUNDS = 4
_TOKENS = 20
WARM_UP = 4


def measure(settings: Settings) -> Iterator[Result]:
    """Yield rows for round trips of 2, 5 and 10 ms, which take turns; eight nodes have one expert of each layer."""
    if why := why_not():
        yield Skipped("decoding on an emulated network", why)
        return
    bundle = demo_bundle("int4", console=settings.console)
    with running(settings, bundle, nodes=NODES, links=[Links(rtt) for rtt in RTTS_MS]) as system:
        parts = Parts(bundle, system.station.model.trunk, past_tokens=48)
        parts.measure()
        steps: dict[float, list[StepRecord]] = {rtt: [] for rtt in RTTS_MS}
        core_ms: dict[float, dict[str, float]] = {rtt: dict.fromkeys(system.core_ms(), 0.0) for rtt in RTTS_MS}
        for i in range(_ROUNDS):
            for rtt in RTTS_MS:
                system.set_links(Links(rtt))
                system.station.dispatcher.measure_links(0.5)
                steps[rtt] += decode(system, PROMPTS[i], tokens=_TOKENS, core_ms=core_ms[rtt])
            parts.measure()
    alone = parts.alone()
    for rtt in RTTS_MS:
        link = FloorLink(rtt, DEDICATED_MBPS)
        causes = [causes_ms(step, link, alone) for step in steps[rtt]]
        yield Row(
            f"decode, {rtt:g} ms round trip, 8 nodes",
            "links, experts, trunk and head alone",
            [step.total_ns / 1e6 for step in steps[rtt]],
            [floor_ms(step, link, alone) for step in steps[rtt]],
            TARGET,
            {
                "rtt_ms": rtt, "mbps": DEDICATED_MBPS, "bundle": bundle.name, "nodes": len(NODES),
                "trunk_alone_ms": alone.trunk_ms, "head_alone_ms": alone.head_ms,
                "expert_alone_ms": alone.compute_ms(1),
                "per_token_ms": {what: ms / len(steps[rtt]) for what, ms in core_ms[rtt].items()},
                "parts": "medians over tokens of the time beyond the floor",
            },
            {cause: statistics.median(c[cause] for c in causes) for cause in causes[0]},
        )  # fmt: skip


def decode(
    system: System, prompt: str, *, tokens: int, core_ms: dict[str, float] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[StepRecord]:  # fmt: skip
    """Generate an answer, and return its decode steps without the first `WARM_UP`.

    Args:
        system: running system.
        prompt: user message.
        tokens: length of the answer.
        core_ms: `System.core_ms` of the returned steps is added to it.
        after_step: called after each step.
    """
    station = system.station
    ids = station.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    steps: list[StepRecord] = []
    before: dict[str, float] = {}
    # Short answers would leave few steps.
    for event in station.new_sequence().generate(ids, SamplingConfig(max_tokens=tokens, ignore_eos=True)):
        after_step()
        steps += [step for step in event.steps if step.phase == "decode"]
        if core_ms is not None and len(steps) == WARM_UP and not before:
            before = system.core_ms()
    if core_ms is not None and before:
        for what, ms in system.core_ms().items():
            core_ms[what] += ms - before[what]
    return steps[WARM_UP:]
