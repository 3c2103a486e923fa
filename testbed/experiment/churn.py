"""Nodes that come and go: kills node processes of ours and starts them again, as a plan's `churn` says."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from testbed.experiment.plan import Churn
from testbed.local_nodes import LocalNodes

Tell = Callable[..., None]


def waits_s(churn: Churn, seed: str) -> Iterator[float]:
    """Seconds from one loss to the next, without end; equal for equal seeds."""
    rng = random.Random(seed)  # noqa: S311 (a schedule, not a secret)
    while True:
        yield churn.every_s * rng.uniform(0.5, 1.5)


@contextmanager
def churning(fleet: LocalNodes, churn: Churn, *, seed: str, tell: Tell) -> Iterator[None]:
    """Meanwhile one node after the other is lost and comes back.

    Args:
        tell: given the name of an event and its fields.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_churn, args=(fleet, churn, seed, tell, stop), name="churn")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _churn(fleet: LocalNodes, churn: Churn, seed: str, tell: Tell, stop: threading.Event) -> None:
    # This thread stays for as long as its nodes: the kernel ends a child with the thread that started it
    # (`die_with_parent`).
    rng = random.Random(f"{seed} node")  # noqa: S311 (a schedule, not a secret)
    for wait_s in waits_s(churn, seed):
        if stop.wait(wait_s):
            return
        node = rng.choice(sorted(fleet.processes))
        process = fleet.processes[node]
        process.kill()
        process.wait()
        tell("node_killed", node=node)
        began = time.monotonic()
        if stop.wait(churn.down_s):
            return
        fleet.restart(node)
        tell("node_restarted", node=node, down_s=time.monotonic() - began)
