"""Watches the answers and makes snapshots of the base station for the live page."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.errors import BusyError
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import Request
from bs_coordinator.page.documents import ModelFacts, Placement, Snapshot, Totals
from bs_coordinator.page.feed import LiveFeed
from bs_coordinator.page.fleet_view import SeenNodes, alarms, fleet_view, placement
from bs_coordinator.page.step_log import StepLog
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError
from wire.status import NodeStatus

if TYPE_CHECKING:
    from bs_coordinator.base_station import BaseStation

SHORTEST_S = 0.25
"""Between two snapshots."""
_IDLE_S = 1.0
"""The same while no step runs and no node comes, goes or fails: then only estimates and temperatures change."""


def load_per_core() -> float:
    """Processes that want to run per core of this machine, 1-minute average."""
    return os.getloadavg()[0] / (os.cpu_count() or 1)


def model_facts(station: "BaseStation", policies: Sequence[str]) -> ModelFacts:
    """What the live page shows of a base station's model and settings.

    Args:
        policies: that requests may name, the base station's own first.
    """
    manifest = station.manifest
    return ModelFacts(
        name=manifest.source.name,
        layers=manifest.dims.layers,
        experts=manifest.dims.experts,
        top_k=manifest.dims.top_k,
        quantisation=str(manifest.quantisation),
        policies=list(policies),
        drafts=station.speculation.mode,
        chat=station.tokenizer.has_chat_template,
    )


class LiveView(AnswerObserver):
    """Feeds the live page.

    Nodes and links are read on the answers thread, in `polled`, and only while there are viewers. Viewers get copies.
    """

    def __init__(
        self, dispatcher: Dispatcher, feed: LiveFeed, model: ModelFacts, *, most_running: int,
        cpu_load: Callable[[], float] = load_per_core, clock: Clock = SYSTEM_CLOCK,
    ) -> None:  # fmt: skip
        """Nothing was observed yet.

        Args:
            model: sent with each viewer's first snapshot.
            most_running: requests that the server accepts at once.
            cpu_load: as `Snapshot.cpu_load`.
            clock: for the time between two snapshots.
        """
        self._dispatcher = dispatcher
        self._feed = feed
        self._model = model
        self._most_running = most_running
        self._cpu_load = cpu_load
        self._clock = clock
        self._log = StepLog(model.layers, model.experts)
        self._seen = SeenNodes()
        # Each count is written by one thread only, or under the server's lock.
        self._accepted = self._ended = self._failed = self._refused = 0
        self._placement: Placement | None = None
        self._sent_s = -_IDLE_S
        self._sent_state: tuple[int, ...] = ()
        self._sent_serial = 0

    def accepted(self, request: Request) -> None:
        """Count a request."""
        self._accepted += 1

    def refused(self, error: BusyError) -> None:
        """Count a request without a place."""
        self._refused += 1

    def progressed(self, request: Request, progress: Progress) -> None:
        """Take in what a step did for a request."""
        self._log.add(progress)

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        """Count the end of a request."""
        self._ended += 1
        self._failed += error is not None

    def polled(self) -> None:
        """Close the step, and publish a snapshot if one is due."""
        self._log.close()
        registry = self._dispatcher.registry
        lost = self._seen.update(registry.nodes, registry.ignored)
        if not self._feed.viewers:
            return
        now_s = self._clock.monotonic_s()
        state = (
            registry.changes, self._dispatcher.health.changes, self._log.last_serial, self._accepted, self._ended,
            self._refused,
        )  # fmt: skip
        if now_s - self._sent_s < SHORTEST_S:
            return
        first = self._feed.take_newcomers()
        if first or state != self._sent_state or now_s - self._sent_s >= _IDLE_S:
            self._sent_s, self._sent_state = now_s, state
            self._feed.publish(self._snapshot(lost, whole=first))

    def _snapshot(self, lost: Mapping[str, NodeStatus], *, whole: bool) -> Snapshot:
        dispatcher, log = self._dispatcher, self._log
        cpu_load = self._cpu_load()
        telemetry = {name: received.telemetry for name, received in dispatcher.telemetry.latest().items()}
        estimates = dispatcher.links.estimates(dispatcher.clock.perf_ns() / 1e9)
        nodes = fleet_view(dispatcher.registry, dispatcher.health, lost, estimates, telemetry, log.nodes)
        running = self._accepted - self._ended
        placed = placement(dispatcher.assigned(), dispatcher.registry.dims.slices)
        placement_changed = placed != self._placement
        self._placement = placed
        steps = log.since(0 if whole else self._sent_serial)
        self._sent_serial = log.last_serial
        return Snapshot(
            unix_ms=time.time_ns() // 1_000_000,
            nodes=nodes,
            alarms=alarms(
                nodes, dispatcher.describe_lost(), cpu_load=cpu_load, running=running, most_running=self._most_running
            ),
            totals=Totals(
                running=running, ended=self._ended, failed=self._failed, refused=self._refused,
                tokens=log.tokens, drafted=log.drafted, accepted=log.accepted, degraded=log.degraded,
            ),
            cpu_load=round(cpu_load, 2),
            model=self._model if whole else None,
            placement=placed if whole or placement_changed else None,
            steps=steps,
            active=log.take_active(),
        )  # fmt: skip
