"""Decoding the demo model on dedicated links, token by token, against the floor."""

import statistics
from collections.abc import Iterator

from bs_coordinator.records import StepRecord
from bs_coordinator.sampling import SamplingConfig
from testbed.bench.alone import Parts
from testbed.bench.floor import Link, causes_ms, floor_ms
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.bench.system import DEDICATED_MBPS, System, running, why_not
from testbed.demo_assets import demo_bundle
from testbed.experiment.prompts import PROMPTS

RTTS_MS = (2.0, 5.0, 10.0)
NODES = {f"node{k}": f"L*:E{k}" for k in range(8)}
TARGET = 1.15
_ROUNDS = 4
_TOKENS = 20
_WARM_UP = 4


def measure(settings: Settings) -> Iterator[Result]:
    """2, 5 and 10 ms round trip, eight nodes with an expert of each layer; the round trips take turns."""
    if why := why_not():
        yield Skipped("decoding on an emulated network", why)
        return
    bundle = demo_bundle("int4", console=settings.console)
    with running(settings, bundle, nodes=NODES, rtts_ms=RTTS_MS) as system:
        parts = Parts(bundle, system.station.model.trunk, past_tokens=48)
        parts.measure()
        steps: dict[float, list[StepRecord]] = {rtt: [] for rtt in RTTS_MS}
        waited_ms: dict[float, dict[str, float]] = {rtt: dict.fromkeys(system.processes, 0.0) for rtt in RTTS_MS}
        for i in range(_ROUNDS):
            for rtt in RTTS_MS:
                system.network.set_profile(f"rtt{rtt:g}")
                system.station.dispatcher.measure_links(0.5)
                before = system.run_queue_ms()
                steps[rtt] += decode(system, PROMPTS[i], tokens=_TOKENS)
                for role, ms in system.run_queue_ms().items():
                    waited_ms[rtt][role] += ms - before[role]
            parts.measure()
    alone = parts.alone()
    for rtt in RTTS_MS:
        link = Link(rtt, DEDICATED_MBPS)
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
                "run_queue_ms_per_token": {
                    role: ms / (_ROUNDS * (_TOKENS - 1)) for role, ms in waited_ms[rtt].items()
                },
                "parts": "medians over tokens of what lies beyond the floor",
            },
            {cause: statistics.median(c[cause] for c in causes) for cause in causes[0]},
        )  # fmt: skip


def decode(system: System, prompt: str, *, tokens: int) -> list[StepRecord]:
    """The decode steps of an answer, the first few left out."""
    station = system.station
    ids = station.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    config = SamplingConfig(max_tokens=tokens, temperature=0.0)
    events = list(station.new_sequence().generate(ids, config))
    steps = [step for event in events for step in event.steps if step.phase == "decode"]
    return steps[_WARM_UP:]
