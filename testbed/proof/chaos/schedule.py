"""The faults of each answer and their times, drawn from a seed. Pure."""

import random
from collections.abc import Sequence
from typing import Literal, get_args

from msgspec import Struct

Kind = Literal[
    "none", "kill", "stop", "broker", "blackhole", "loss", "slow", "clock", "noise", "flood", "strangers", "disk",
    "base-station",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
LINK_KINDS: tuple[Kind, ...] = ("blackhole", "loss", "slow")
"""Kinds that need an emulated network."""
LOSSES_PERCENT = (5, 10, 20, 30)


class Fault(Struct, frozen=True):
    """One fault during one answer.

    Attributes:
        kind: what happens; `TestSystem.inject` does it.
        node: node concerned; empty for faults that concern no node.
        after_tokens: number of tokens of the answer after which the fault begins.
        for_s: duration in seconds.
        level: severity where there are degrees: lost frames in %.
    """

    kind: Kind
    node: str = ""
    after_tokens: int = 0
    for_s: float = 0.0
    level: int = 0


def draw(seed: int, answer: int, nodes: Sequence[str], kinds: Sequence[Kind], *, tokens: int) -> list[Fault]:
    """The faults of one answer: one, or in a third of the answers two of different kinds.

    Args:
        seed: the same seed gives the same faults.
        answer: number of the answer.
        nodes: node ids.
        kinds: kinds to draw from; they take turns as the first fault, so each occurs equally often.
        tokens: length of the answer; faults begin in its first half.
    """
    rng = random.Random(f"{seed} {answer}")  # noqa: S311 - to be reproduced, not to be secret
    order = random.Random(f"{seed} {answer // len(kinds)}").sample(list(kinds), len(kinds))  # noqa: S311
    chosen = [order[answer % len(kinds)]]
    others = [kind for kind in kinds if kind not in (*chosen, "none")]
    if others and chosen[0] != "none" and rng.random() < 1 / 3:
        chosen.append(rng.choice(others))
    return [_fault(rng, kind, nodes, tokens) for kind in chosen]


def _fault(rng: random.Random, kind: Kind, nodes: Sequence[str], tokens: int) -> Fault:
    hits_node = kind in ("kill", "stop", "blackhole", "slow", "clock")
    return Fault(
        kind=kind,
        node=rng.choice(list(nodes)) if hits_node else "",
        after_tokens=rng.randrange(1, max(2, tokens // 2)),
        for_s={"stop": 5.0, "broker": rng.uniform(0.0, 3.0)}.get(kind, rng.uniform(1.0, 4.0)),
        level=rng.choice(LOSSES_PERCENT) if kind == "loss" else 0,
    )
