"""Prompts of 32 to 1024 tokens: overlapping micro-batches compared with the same micro-batches one by one."""

import time
from collections.abc import Iterator
from typing import Any

from bs_coordinator.engine.sequence import PREFILL_CHUNK_TOKENS
from bs_coordinator.trunk.inputs import SequenceInput
from testbed.bench.rows import Result, Row, Settings, Skipped, in_turns
from testbed.bench.sections.decode import NODES
from testbed.bench.system import System, running, why_not
from testbed.demo_assets import demo_bundle
from testbed.network.uniform import DEDICATED_MBPS, Links

TOKENS = (32, 64, 128, 256, 512, 1024)
_RTT_MS = 5.0
_SAMPLES = 3


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row per prompt length, on dedicated links with eight nodes; the two arms take turns."""
    if why := why_not():
        yield Skipped("prefill on an emulated network", why)
        return
    bundle = demo_bundle("int4", console=settings.console)
    with running(settings, bundle, nodes=NODES, links=[Links(_RTT_MS)]) as system:
        prefill(system, TOKENS[-1], together=True)  # lets nodes allocate their buffers
        for tokens in TOKENS:
            parts: dict[bool, list[dict[str, float]]] = {True: [], False: []}

            def run(together: bool, tokens: int = tokens, parts: dict[bool, Any] = parts) -> None:
                parts[together].append(prefill(system, tokens, together=together))

            ours, floor = in_turns(lambda: run(True), lambda: run(False), _SAMPLES, warm_up=1)
            yield Row(
                f"prefill {tokens} tokens, {_RTT_MS:g} ms round trip, 8 nodes",
                "the same pieces one after the other",
                ours,
                floor,
                None,
                {
                    "tokens": tokens, "rtt_ms": _RTT_MS, "mbps": DEDICATED_MBPS, "bundle": bundle.name,
                    "piece_tokens": system.station.model.piece_tokens,
                    "tokens_per_s": 1000 * tokens / sorted(ours)[len(ours) // 2],
                    "one_after_the_other": parts[False][1:], "together": parts[True][1:],
                },
            )  # fmt: skip


def prefill(system: System, tokens: int, *, together: bool) -> dict[str, float]:
    """Run a prompt; return the milliseconds in total, in the trunk, and in dispatch.

    Args:
        system: running system.
        tokens: length of the prompt.
        together: overlap micro-batches; otherwise run them one by one.
    """
    model = system.station.model
    text = "The quick brown fox jumps over the lazy dog, and nobody knows why it does so every day. " * 80
    ids = system.station.tokenizer.encode(text)[:tokens]
    cache = model.trunk.new_cache()
    began = time.perf_counter_ns()
    trunk_ns = waited_ns = start = 0
    while start < len(ids):
        step = ids[start : start + PREFILL_CHUNK_TOKENS]
        pieces = [step] if together else _pieces(step, model.piece_tokens)
        for piece in pieces:
            _, record = model.step([SequenceInput(piece, cache)])
            trunk_ns += record.head_ns + sum(layer.trunk_ns for layer in record.layers)
            waited_ns += sum(layer.dispatch_ns for layer in record.layers)
        start += len(step)
    total_ns = time.perf_counter_ns() - began
    return {"total": total_ns / 1e6, "trunk": trunk_ns / 1e6, "dispatch": waited_ns / 1e6}


def _pieces(ids: list[int], most: int) -> list[list[int]]:
    """Split `ids` into equal parts of at most `most`, as a step does."""
    count = -(-len(ids) // most)
    return [ids[len(ids) * i // count : len(ids) * (i + 1) // count] for i in range(count)]
