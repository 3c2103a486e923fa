"""An open base station behind the thread that owns it: answers for callers in any thread.

The thread keeps the connection alive while the program does something else, such as waiting for a notebook's user, and
lets an interrupt end an answer between two steps instead of in the middle of a layer.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from bs_coordinator.base_station import BaseStation
from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import TokenEvent
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.request_policy import NamedPolicy, RequestPolicies
from bs_coordinator.http.requests import Request, StreamUpdate
from bs_coordinator.page.documents import NodeView
from bs_coordinator.page.fleet_view import SeenNodes, fleet_view
from bs_coordinator.page.step_log import StepLog
from bs_coordinator.selection import Policy
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
        dims, model = station.manifest.dims, station.model
        self._policies = RequestPolicies(
            NamedPolicy(station.config.policy, model.policy), top_k=dims.top_k, scored=model.trunk.scored,
            model_sha256=station.manifest.model_sha256, files=True,
        )  # fmt: skip
        self._fleet = _FleetView(station)
        self._server = AnswerServer(
            Scheduler(model), station.new_sequence, max_waiting=_MOST_WAITING, dispatcher=station.dispatcher,
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
            policy: chooses the experts; None for the config's. Answers with different policies take turns.
            same_text: the answer continues the prompt's text.

        Raises:
            ConfigError: the policy is wrong.
            BusyError: too many answers are running.
        """
        updates: SimpleQueue[StreamUpdate] = SimpleQueue()
        request = self._server.accept(sampling, updates.put, same_text=same_text, policy=self._policy(policy))
        self._server.submit(request, ids)
        return EventStream(updates, lambda: self._server.cancel(request))

    def _policy(self, text: str | None) -> Policy | None:
        if text in (None, self._config.policy):
            return None  # with it, answers may have drafts
        try:
            return self._policies.find(text).policy
        except ValueError as error:
            raise ConfigError(f"policy: {error}") from None


class EventStream:
    """The tokens of an answer as they come. An error, an interrupt, and dropping the stream end the answer."""

    def __init__(self, updates: "SimpleQueue[StreamUpdate]", cancel: Callable[[], None]) -> None:
        """The answer has begun.

        Args:
            cancel: called if the answer is not read to its end. It must take no lock: a stream may be collected as
                garbage in any thread, while that holds any lock.
        """
        self._updates = updates
        self._cancel = cancel
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
            self._cancel()

    def __del__(self) -> None:
        if not self._over:
            self._cancel()


class _FleetView(AnswerObserver):
    """Reads nodes and links on the thread that owns them, whenever somebody wants to look."""

    def __init__(self, station: BaseStation) -> None:
        self.looks: SimpleQueue[Future[list[NodeView]]] = SimpleQueue()
        self._dispatcher = station.dispatcher
        self._log = StepLog(station.manifest.dims.layers, station.manifest.dims.experts)
        self._seen = SeenNodes()

    def progressed(self, request: Request, progress: Progress) -> None:
        self._log.add(progress)

    def polled(self) -> None:
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
