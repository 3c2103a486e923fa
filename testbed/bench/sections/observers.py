"""What metrics and traces cost while decoding: steps of the demo model with and without them take turns, one by one."""

import itertools
import queue
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from bs_coordinator.base_station import BaseStation, open_base_station
from bs_coordinator.broker.processes import open_broker
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.requests import Request
from bs_coordinator.metrics import StationMetrics
from common.errors import WdmoeError
from testbed.bench.chat_prompts import CHAT_PROMPTS
from testbed.bench.rows import Result, Row, Settings, Skipped
from testbed.demo_assets import demo_bundle
from testbed.local_nodes import local_nodes

TARGET = 1.02
_NODES = {f"node{k}": f"L*:E{k}" for k in range(8)}
_TOKENS = 64
_WARM_UP = 4
"""Steps of each answer that are not counted."""
_ANSWER_S = 600.0
_FLUSH_MS = 60_000
_NONE, _METRICS, _TRACES = "no observers", "metrics", "metrics and traces"


def measure(settings: Settings) -> Iterator[Result]:
    """Yield a row for metrics, and one for metrics and traces; a sample is the time between two steps' ends."""
    bundle = demo_bundle("int4", console=settings.console)
    with (
        open_broker(settings.broker) as address,
        local_nodes(bundle, address, settings.folder / "nodes", _NODES),
        open_base_station(BaseStationConfig(bundle=bundle, draft="none"), address) as station,
    ):
        metrics = StationMetrics(station.dispatcher, model="demo")
        arms: dict[str, Sequence[AnswerObserver]] = {_NONE: (), _METRICS: (metrics,)}
        encoded_s: list[float] = []
        flush: Callable[[int], bool] | None = None
        try:
            spans, flush = _spans(encoded_s)
            arms[_TRACES] = (metrics, spans)
        except ModuleNotFoundError as error:
            yield Skipped(_TRACES, f"{error.name} is not installed: pip install 'wdmoe[tracing]'")
        turns = _Turns(arms)
        _decode(station, turns, settings.samples)
        if flush is not None and not flush(_FLUSH_MS):
            raise WdmoeError(f"spans were not encoded within {_FLUSH_MS / 1e3:.0f} s")
    steps = sum(len(samples) for samples in turns.step_ms.values())
    for name in list(arms)[1:]:
        parts = {"observers, processor time per step": turns.observed_ms[name] / len(turns.step_ms[name])}
        if name == _TRACES:
            parts["encoding in the background, per step"] = 1e3 * sum(encoded_s) / len(turns.step_ms[name])
        yield Row(
            f"decode with {name}, {len(_NODES)} nodes on loopback", "decode without observers",
            turns.step_ms[name], turns.step_ms[_NONE], TARGET,
            {"bundle": bundle.name, "nodes": len(_NODES), "steps": steps, "parts": "means"}, parts,
        )  # fmt: skip


class _Turns(AnswerObserver):
    """Calls the observers of another arm in each step. All arms see each request begin and end.

    Attributes:
        step_ms: of each arm, the time of each of its steps; sample k of all arms is of the same turn.
        observed_ms: of each arm, the processor time of its observers in these steps.
    """

    def __init__(self, arms: Mapping[str, Sequence[AnswerObserver]]) -> None:
        self.step_ms: dict[str, list[float]] = {name: [] for name in arms}
        self.observed_ms: dict[str, float] = defaultdict(float)
        self._arms = arms
        orders = list(itertools.permutations(arms))
        self._order = itertools.chain.from_iterable(itertools.cycle(orders))
        self._arm = next(self._order)
        self._turn: dict[str, tuple[float, float]] = {}
        self._decoded = self._steps = 0
        self._observed_ns = 0
        self._since_ns = 0

    def accepted(self, request: Request) -> None:
        for observer in self._observers():
            observer.accepted(request)

    def ended(self, request: Request, error: WdmoeError | None) -> None:
        for observer in self._observers():
            observer.ended(request, error)
        self._steps = 0

    def progressed(self, request: Request, progress: Progress) -> None:
        self._call(lambda observer: observer.progressed(request, progress))
        self._decoded = progress.step is not None and progress.step.phase == "decode"

    def polled(self) -> None:
        self._call(lambda observer: observer.polled())
        now_ns = time.perf_counter_ns()
        if self._decoded:
            self._steps += 1
            if self._steps > _WARM_UP:
                self._note((now_ns - self._since_ns) / 1e6)
        self._decoded = False
        self._observed_ns = 0
        self._since_ns = time.perf_counter_ns()

    def _observers(self) -> set[AnswerObserver]:
        return {observer for observers in self._arms.values() for observer in observers}

    def _call(self, call: Callable[[AnswerObserver], None]) -> None:
        began_ns = time.thread_time_ns()
        for observer in self._arms[self._arm]:
            call(observer)
        self._observed_ns += time.thread_time_ns() - began_ns

    def _note(self, step_ms: float) -> None:
        self._turn[self._arm] = step_ms, self._observed_ns / 1e6
        if len(self._turn) == len(self._arms):
            for name, (took_ms, observed_ms) in self._turn.items():
                self.step_ms[name].append(took_ms)
                self.observed_ms[name] += observed_ms
            self._turn = {}
        self._arm = next(self._order)


def _decode(station: BaseStation, turns: _Turns, samples: int) -> None:
    """Answer prompts, one after the other, until every arm has its samples."""
    server = AnswerServer(
        Scheduler(station.model, max_live=1), station.new_sequence, max_waiting=0, dispatcher=station.dispatcher,
        observers=[turns],
    )  # fmt: skip
    server.start()
    try:
        for prompt in itertools.cycle(CHAT_PROMPTS):
            if min(map(len, turns.step_ms.values())) >= samples:
                return
            updates: queue.Queue[object] = queue.Queue()
            request = server.accept(SamplingConfig(max_tokens=_TOKENS, ignore_eos=True), updates.put)
            server.submit(request, station.tokenizer.encode_chat([{"role": "user", "content": prompt}]))
            deadline_s = time.monotonic() + _ANSWER_S
            while server.load().requests:
                if time.monotonic() > deadline_s:
                    raise WdmoeError(f"an answer took more than {_ANSWER_S:.0f} s")
                time.sleep(0.01)
    finally:
        server.stop()


def _spans(encoded_s: list[float]) -> tuple[AnswerObserver, Callable[[int], bool]]:
    """An observer that makes spans, which are encoded in the background as if they were sent.

    Also returns what encodes those that still wait, within so many milliseconds; False if that was too short.

    Args:
        encoded_s: the processor time of each batch is added to it.
    """
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    from bs_coordinator.tracing.answer_spans import AnswerSpans

    class Encoder(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            began_s = time.thread_time()
            encode_spans(spans).SerializeToString()
            encoded_s.append(time.thread_time() - began_s)
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Encoder()))
    return AnswerSpans(provider.get_tracer("bench"), model="demo"), provider.force_flush
