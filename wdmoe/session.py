"""An open base station behind the thread that owns it: answers for callers in any thread, one policy at a time.

The thread keeps the connection alive while the program does something else, such as waiting for a notebook's user, and
lets an interrupt end an answer between two steps instead of in the middle of a layer.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from bs_coordinator.base_station import BaseStation
from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import Sequence, TokenEvent
from bs_coordinator.engine.speculation import Speculation
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import Request, StreamUpdate
from bs_coordinator.page.documents import NodeView
from bs_coordinator.page.fleet_view import SeenNodes, fleet_view
from bs_coordinator.page.step_log import StepLog
from bs_coordinator.selection import TopK
from bs_coordinator.selection.registry import check_scores, policy_for_model
from common.config import ConfigError
from common.errors import WdmoeError
from wire.status import NodeStatus

_MOST_WAITING = 1000
"""Answers that may wait for a place, for programs with many threads."""


class Session:
    """Answers of one base station. `start` and `stop` belong to one thread, all else is for any."""

    def __init__(self, station: BaseStation) -> None:
        """Nothing runs before `start`."""
        self.station = station
        self._config = station.config
        self._policy = station.config.policy
        self._running: set[int] = set()
        self._abandoned: set[int] = set()
        self._changed = threading.Condition()
        self._dropped: SimpleQueue[Request] = SimpleQueue()
        self._fleet = _FleetView(station, self._ended, self._end_dropped)
        self._server = AnswerServer(
            Scheduler(station.model), self._new_sequence, max_waiting=_MOST_WAITING, dispatcher=station.dispatcher,
            observers=[self._fleet],
        )  # fmt: skip

    def start(self) -> None:
        """Start the thread."""
        self._server.start()

    def stop(self) -> None:
        """End all answers with an error, and the thread."""
        self._server.stop()

    def nodes(self) -> list[NodeView]:
        """The nodes with the estimates of their links.

        Raises:
            WdmoeError: the base station is busy with one step for longer than a layer may take.
        """
        look: Future[list[NodeView]] = Future()
        self._fleet.looks.put(look)
        try:
            return look.result(2 * self._config.layer_timeout_s)
        except TimeoutError:
            raise WdmoeError("the base station is busy with a step: ask for its nodes again later") from None

    def answer(self, ids: list[int], sampling: SamplingConfig, *, policy: str | None, same_text: bool) -> "EventStream":
        """Begin an answer.

        Args:
            ids: the prompt.
            policy: chooses the experts; None for the config's.
            same_text: the answer continues the prompt's text.

        Raises:
            ConfigError: the policy is wrong, or answers with another one are running.
            BusyError: too many answers are running.
        """
        updates: SimpleQueue[StreamUpdate] = SimpleQueue()
        with self._changed:
            self._use_policy(policy or self._config.policy)
            request = self._server.accept(sampling, updates.put, same_text=same_text)
            self._running.add(id(request))
        self._server.submit(request, ids)
        return EventStream(updates, lambda: self._abandon(request), lambda: self._dropped.put(request))

    def _abandon(self, request: Request) -> None:
        with self._changed:
            # An ended request's id may already be another one's.
            self._abandoned |= self._running & {id(request)}
        self._server.cancel(request)

    def _end_dropped(self) -> None:
        while True:
            try:
                self._abandon(self._dropped.get_nowait())
            except Empty:
                return

    def _ended(self, request: Request) -> None:
        with self._changed:
            self._running.discard(id(request))
            self._abandoned.discard(id(request))
            self._changed.notify_all()

    def _use_policy(self, text: str) -> None:
        if text == self._policy:
            return
        station = self.station
        manifest = station.manifest
        try:
            policy = policy_for_model(text, manifest)
            if not station.model.trunk.scored:
                check_scores(text, policy, top_k=manifest.dims.top_k)
        except ValueError as error:
            raise ConfigError(f"policy: {error}") from None
        self._end_dropped()
        if self._running == self._abandoned:
            # The thread ends them after the step that is running.
            self._changed.wait_for(lambda: not self._running, 2 * self._config.layer_timeout_s)
        if self._running:
            raise ConfigError(
                f"policy: an answer with '{self._policy}' is not finished: read or close it before one with '{text}'"
            )
        station.model.policy = policy
        self._policy = text

    def _new_sequence(self) -> Sequence:
        station = self.station
        # `auto` promises that drafts leave answers unchanged, which holds for no other policy.
        drafts = self._config.draft != "auto" or isinstance(station.model.policy, TopK)
        return Sequence(
            station.model, station.tokenizer, speculation=station.speculation if drafts else Speculation()
        )  # fmt: skip


class EventStream:
    """The tokens of an answer as they come. An error, an interrupt, and dropping the stream end the answer."""

    def __init__(
        self, updates: "SimpleQueue[StreamUpdate]", abandon: Callable[[], None], dropped: Callable[[], None]
    ) -> None:
        """The answer has begun.

        Args:
            abandon: called if the answer is not read to its end.
            dropped: called instead if the stream is collected as garbage, which may happen in any thread, while that
                holds any lock.
        """
        self._updates = updates
        self._abandon = abandon
        self._dropped = dropped
        self._events: deque[TokenEvent] = deque()
        self._over = False

    def __iter__(self) -> "EventStream":
        return self

    def __next__(self) -> TokenEvent:
        try:
            while not self._events:
                if self._over:
                    raise StopIteration
                events, error = self._updates.get()
                if error is not None:
                    self._over = True
                    raise error
                self._events.extend(events)
                self._over = bool(events) and events[-1].stop is not None
            return self._events.popleft()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the answer, if it is not over."""
        self._events.clear()
        if not self._over:
            self._over = True
            self._abandon()

    def __del__(self) -> None:
        if not self._over:
            self._dropped()


class _FleetView(AnswerObserver):
    """Reads nodes and links on the thread that owns them, whenever somebody wants to look."""

    def __init__(self, station: BaseStation, on_end: Callable[[Request], None], on_poll: Callable[[], None]) -> None:
        self.looks: SimpleQueue[Future[list[NodeView]]] = SimpleQueue()
        self._dispatcher = station.dispatcher
        self._on_end = on_end
        self._on_poll = on_poll
        self._log = StepLog(station.manifest.dims.layers, station.manifest.dims.experts)
        self._seen = SeenNodes()

    def progressed(self, request: Request, progress: Progress) -> None:
        self._log.add(progress)

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        self._on_end(request)

    def polled(self) -> None:
        self._on_poll()
        self._log.close()
        registry = self._dispatcher.registry
        lost = self._seen.update(registry.nodes, registry.ignored)
        while True:
            try:
                look = self.looks.get_nowait()
            except Empty:
                return
            look.set_result(self._look(lost))

    def _look(self, lost: Mapping[str, NodeStatus]) -> list[NodeView]:
        dispatcher = self._dispatcher
        telemetry = {name: received.telemetry for name, received in dispatcher.telemetry.latest().items()}
        estimates = dispatcher.links.estimates(dispatcher.clock.perf_ns() / 1e9)
        return fleet_view(dispatcher.registry, dispatcher.health, lost, estimates, telemetry, self._log.nodes)
