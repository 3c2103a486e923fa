"""The loop: inputs in, refusals out; anything else is a finding."""

import os
import random
import time
from collections import Counter
from pathlib import Path

import psutil
from msgspec import Struct

from testbed.proof.fuzz.mutate import mutate
from testbed.proof.fuzz.targets import Target


class Finding(Struct, frozen=True):
    """An input that was neither understood nor refused."""

    number: int
    error: str
    input_hex: str


class Report(Struct, frozen=True, kw_only=True):
    """What became of the inputs of one target.

    Attributes:
        refused: by the reason that is counted in the field, or the kind of error.
        slowest_ms: of one input.
        grown_bytes: how much more memory the process held at the end than after the first hundredth.
    """

    target: str
    seed: int
    inputs: int
    understood: int
    refused: dict[str, int]
    findings: list[Finding]
    seconds: float
    slowest_ms: float
    grown_bytes: int


def fuzz(name: str, target: Target, *, inputs: int, seed: int) -> Report:
    """Try `inputs` inputs; the same seed gives the same ones."""
    rng = random.Random(f"{seed} {name}")  # noqa: S311 - to be reproduced
    refused: Counter[str] = Counter()
    findings: list[Finding] = []
    understood, slowest_s, settled_bytes = 0, 0.0, 0
    process = psutil.Process(os.getpid())
    began = time.perf_counter()
    for number in range(inputs):
        data = mutate(rng, target.seeds)
        if target.repair and rng.random() < 0.5:
            data = target.repair(data)
        if number == inputs // 100:
            settled_bytes = process.memory_info().rss
        start = time.perf_counter()
        try:
            target.read(data)
        except target.refusals as error:
            refused[getattr(error, "reason", type(error).__name__)] += 1
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            findings.append(Finding(number, f"{type(error).__name__}: {error}"[:300], data[:4096].hex()))
        else:
            understood += 1
        slowest_s = max(slowest_s, time.perf_counter() - start)
    return Report(
        target=name, seed=seed, inputs=inputs, understood=understood, refused=dict(refused), findings=findings,
        seconds=time.perf_counter() - began, slowest_ms=1000 * slowest_s,
        grown_bytes=process.memory_info().rss - settled_bytes,
    )  # fmt: skip


def example_files() -> tuple[bytes, bytes]:
    """A good plan and a good network."""
    room = Path(__file__).parents[2]
    plan = room / "experiment" / "plans" / "policies.yaml"
    return plan.read_bytes(), (room / "network" / "specs" / "wifi.yaml").read_bytes()
