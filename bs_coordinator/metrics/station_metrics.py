"""All metrics of a base station in one registry, and their exposition."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Info, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.engine.scheduler import Progress
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.errors import BusyError
from bs_coordinator.http.metrics import MetricsSource
from bs_coordinator.http.requests import Request
from bs_coordinator.metrics.node_metrics import NodeMetrics
from bs_coordinator.metrics.request_metrics import RequestMetrics
from bs_coordinator.metrics.snapshot import take_snapshot
from bs_coordinator.metrics.step_metrics import StepMetrics
from bs_coordinator.nodes.registry import LOCAL_NODE
from common.clock import SYSTEM_CLOCK, Clock
from common.errors import WdmoeError
from wire import __version__

_SNAPSHOT_EVERY_S = 1.0
_FORGET_S = 300.0
"""A node's time series are removed once it has been offline for this long: names of nodes must not pile up."""

# When each series began is of no use to Prometheus, and would double the number of counters. For the whole process:
# nothing else in it uses this library.
disable_created_metrics()  # type: ignore[no-untyped-call]


class StationMetrics(MetricsSource):
    """Observes the answers of a server and describes its nodes."""

    def __init__(
        self, dispatcher: Dispatcher, *, model: str = "", preset: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:  # fmt: skip
        """Nothing is counted yet.

        Args:
            dispatcher: read on the answers thread only.
            model: name of the model.
            preset: what a preset chose, by option; None without one.
            clock: the answer server's.
        """
        self._dispatcher = dispatcher
        self._clock = clock
        self._registry = CollectorRegistry()
        self._requests = RequestMetrics(self._registry, clock)
        self._steps = StepMetrics(self._registry)
        self._nodes = NodeMetrics()
        self._registry.register(self._nodes)
        ProcessCollector(registry=self._registry)
        Info("wdmoe", "The base station.", registry=self._registry).info({"version": __version__, "model": model})
        if preset:
            info = Info("wdmoe_preset", "What --preset chose.", registry=self._registry)
            info.info({"name": preset["preset"], **{key: value for key, value in preset.items() if key != "preset"}})
        self._responses = Counter(
            "wdmoe_http_responses", "HTTP responses begun.", ["path", "code"], registry=self._registry
        )
        self._last_step: StepRecord | None = None
        self._snapshot_s = -_SNAPSHOT_EVERY_S
        self._seen_s: dict[str, float] = {}

    def accepted(self, request: Request) -> None:
        """Count a request."""
        self._requests.accepted(request)

    def refused(self, error: BusyError) -> None:
        """Count a refusal."""
        self._requests.refused(error)

    def progressed(self, request: Request, progress: Progress) -> None:
        """Take in a request's new tokens, and the step unless it came with another request already."""
        self._requests.progressed(request, progress)
        # All answers of a step come one after the other.
        if progress.step is not None and progress.step is not self._last_step:
            self._last_step = progress.step
            self._steps.observe(progress.step)

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        """Count the end of a request."""
        self._requests.ended(request, error)

    def polled(self) -> None:
        """Read the nodes' state now and then."""
        now_s = self._clock.monotonic_s()
        if now_s - self._snapshot_s >= _SNAPSHOT_EVERY_S:
            self._snapshot_s = now_s
            self._look(now_s)

    def responded(self, path: str, code: int) -> None:
        """Count an HTTP response.

        Args:
            path: one of a few.
            code: its status code.
        """
        self._responses.labels(path, code).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics as text, from any thread.

        Args:
            accept: the request's Accept header: Prometheus' text format unless OpenMetrics is preferred.

        Returns:
            The body and its content type.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _look(self, now_s: float) -> None:
        snapshot = take_snapshot(self._dispatcher)
        self._seen_s |= dict.fromkeys(snapshot.statuses, now_s)
        for node in self._steps.nodes:
            self._seen_s.setdefault(node, now_s)
        for node, seen_s in list(self._seen_s.items()):
            if now_s - seen_s > _FORGET_S and node != LOCAL_NODE:
                del self._seen_s[node]
                self._steps.drop(node)
        self._nodes.show(snapshot, self._seen_s.keys() - snapshot.statuses.keys() - {LOCAL_NODE})
