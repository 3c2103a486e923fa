"""Churn: kills local node processes one at a time and starts them again, as a plan's `churn` says."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from testbed.local_nodes import LocalNodes
from testbed.plan.schema import Churn

EmitEvent = Callable[..., None]
"""Takes the name of an event and its fields."""


def waits_s(churn: Churn, seed: str) -> Iterator[float]:
    """Endless sequence of seconds from one loss to the next; equal seeds give equal sequences."""
    rng = random.Random(seed)  # noqa: S311 (a schedule, not a secret)
    while True:
        yield churn.every_s * rng.uniform(0.5, 1.5)


@contextmanager
def churning(nodes: LocalNodes, churn: Churn, *, seed: str, emit_event: EmitEvent) -> Iterator[None]:
    """Kill and restart one node after another for the duration of the context.

    Args:
        emit_event: called with `node_killed` and `node_restarted`.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_churn, args=(nodes, churn, seed, emit_event, stop), name="churn")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _churn(nodes: LocalNodes, churn: Churn, seed: str, emit_event: EmitEvent, stop: threading.Event) -> None:
    # This thread must live as long as the nodes it starts: the kernel kills a child when the thread that started it
    # ends (`die_with_parent`).
    rng = random.Random(f"{seed} node")  # noqa: S311 (a schedule, not a secret)
    for wait_s in waits_s(churn, seed):
        if stop.wait(wait_s):
            return
        node = rng.choice(sorted(nodes.processes))
        process = nodes.processes[node]
        process.kill()
        process.wait()
        emit_event("node_killed", node=node)
        began = time.monotonic()
        if stop.wait(churn.down_s):
            return
        nodes.restart(node)
        emit_event("node_restarted", node=node, down_s=time.monotonic() - began)
