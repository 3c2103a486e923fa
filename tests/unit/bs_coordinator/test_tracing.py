"""Traces of answers: spans of a real station with two nodes, and what a collector receives over HTTP."""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.step_records import StepRecord
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.requests import Request, TraceHeaders
from bs_coordinator.tracing import answer_traces
from bs_coordinator.tracing.answer_spans import AnswerSpans
from common.errors import MissingPackageError
from tests.http_site import HttpSite
from tests.node_threads import node_thread
from tests.waiting import PATIENCE_S, wait_until
from wire.tensors import WireDtype
from wire.transports.memory import MemoryBroker

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
CALLERS = TraceHeaders(f"00-{TRACE}-{PARENT}-01", "vendor=1")


class _Steps(AnswerObserver):
    """Every step's record once."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def progressed(self, request: Request, progress: Progress) -> None:
        if progress.step is not None and all(progress.step is not other for other in self.records):
            self.records.append(progress.step)


@contextmanager
def server(bundle: Path, observers: list[AnswerObserver]) -> Iterator[tuple[AnswerServer, Any]]:
    """A server of a station with two nodes in this process, not started, and the station's tokenizer."""
    with (
        MemoryBroker() as broker,
        node_thread(bundle, broker.address, "a", "L*:E0-1"),
        node_thread(bundle, broker.address, "b", "L*:E2-3"),
        open_base_station(BaseStationConfig(bundle=bundle, wire=WireDtype.FP32), broker.address) as station,
    ):
        made = AnswerServer(
            Scheduler(station.model, max_live=2), station.new_sequence, max_waiting=2,
            dispatcher=station.dispatcher, observers=observers,
        )  # fmt: skip
        yield made, station.tokenizer


def answer(made: AnswerServer, prompts: list[list[int]], *, trace: TraceHeaders = CALLERS, tokens: int = 4) -> None:
    """Start the server, and have it answer; all requests have their places before the first step."""
    done: queue.Queue[object] = queue.Queue()
    for ids in prompts:
        request = made.accept(SamplingConfig(max_tokens=tokens), done.put, same_text=True, trace=trace)
        made.submit(request, ids)
    made.start()
    while made.load().requests:
        done.get(timeout=PATIENCE_S)
    made.stop()


@pytest.fixture(scope="module")
def traced(random_bundle: Path) -> tuple[list[ReadableSpan], list[StepRecord]]:
    """The spans of two answers that share steps and of one that fails, and the records of the steps."""
    exporter, steps = InMemorySpanExporter(), _Steps()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = AnswerSpans(provider.get_tracer("test"), model="random")
    with server(random_bundle, [steps, spans]) as (made, _):
        answer(made, [[1, 2, 3, 4, 5], [6, 7, 8], [1] * 1000])
    return list(exporter.get_finished_spans()), steps.records


def children(spans: list[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    return [s for s in spans if s.parent and s.parent.span_id == parent.context.span_id]


def attribute(span: ReadableSpan, name: str) -> Any:
    assert span.attributes is not None
    return span.attributes[name]


def answers(spans: list[ReadableSpan]) -> list[ReadableSpan]:
    found = [span for span in spans if span.name == "text_completion random"]
    return sorted(found, key=lambda span: span.start_time or 0)


def test_every_answer_continues_the_callers_trace(traced: tuple[list[ReadableSpan], list[StepRecord]]) -> None:
    spans, _ = traced
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    roots = answers(spans)
    assert [f"{span.parent.span_id:016x}" for span in roots if span.parent] == [PARENT] * 3
    assert [attribute(root, "gen_ai.usage.output_tokens") for root in roots] == [4, 4, 0]
    assert [attribute(root, "gen_ai.usage.input_tokens") for root in roots[:2]] == [5, 3]
    assert [attribute(root, "gen_ai.response.finish_reasons") for root in roots[:2]] == [("max-tokens",)] * 2
    assert [event.name for event in roots[0].events] == ["first token"]
    assert [root.status.status_code for root in roots] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    assert attribute(roots[2], "error.type") == "ContextLengthError"


def test_steps_and_layers_are_those_of_the_records(traced: tuple[list[ReadableSpan], list[StepRecord]]) -> None:
    spans, records = traced
    steps = children(spans, answers(spans)[0])
    assert [step.name for step in steps] == [record.phase for record in records]
    for step, record in zip(steps, records, strict=True):
        assert (step.end_time or 0) - (step.start_time or 0) == record.total_ns
        assert attribute(step, "wdmoe.tokens") == record.tokens
        stages = sum(attribute(step, f"wdmoe.{s}_ms") for s in ("trunk", "network", "compute", "wait", "framing"))
        assert stages == pytest.approx(record.total_ns / 1e6)
        layers = children(spans, step)
        assert [attribute(layer, "wdmoe.layer") for layer in layers] == [
            layer.layer for layer in record.layers if layer.dispatches
        ]
        for span in layers:
            dispatches = record.layers[attribute(span, "wdmoe.layer")].dispatches
            assert set(attribute(span, "wdmoe.nodes")) == {d.node for d in dispatches} <= {"a", "b"}
            assert attribute(span, "wdmoe.rows") == sum(d.tokens for d in dispatches)
            assert attribute(span, "wdmoe.down_bytes") == sum(d.down_bytes for d in dispatches)
            assert attribute(span, "wdmoe.up_bytes") == sum(d.up_bytes for d in dispatches)
            assert attribute(span, "wdmoe.degraded_tokens") == 0
            assert (span.end_time or 0) - (span.start_time or 0) >= max(d.round_trip_ns for d in dispatches)


def test_a_shared_step_is_in_both_traces_and_its_layers_once(
    traced: tuple[list[ReadableSpan], list[StepRecord]],
) -> None:
    spans, records = traced
    first, second = (children(spans, root) for root in answers(spans)[:2])
    assert len(first) == len(second) == len(records)
    for one, other in zip(first, second, strict=True):
        assert (one.start_time, one.end_time) == (other.start_time, other.end_time)
        assert [link.context.span_id for link in other.links] == [one.context.span_id]
        assert not one.links
        assert children(spans, one)
        assert not children(spans, other)


class _Collector(ThreadingHTTPServer):
    """Receives OTLP over HTTP, as any collector does.

    Attributes:
        requests: decoded, in order.
        open: answers are held back until it is set.
    """

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.open = threading.Event()
        self.open.set()
        super().__init__(("127.0.0.1", 0), _Receiver)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[Any]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector = self.server
        assert isinstance(collector, _Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
        collector.open.wait(PATIENCE_S)
        collector.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Collector]:
    collector = _Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.open.set()
    collector.shutdown()
    collector.server_close()


def test_a_collector_receives_the_traces_of_http_requests(
    random_bundle: Path, collector: _Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "kitchen")
    monkeypatch.setattr("bs_coordinator.tracing.export._LAST_SPANS_S", PATIENCE_S)
    with answer_traces(asked_for=False, model="random") as traces:
        assert len(traces) == 1
        with server(random_bundle, traces) as (made, tokenizer):
            made.start()
            site = HttpSite(http_app(made, tokenizer, model="random", stall_s=PATIENCE_S))
            try:
                body = {"model": "random", "prompt": "w1 w2", "max_tokens": 2, "temperature": 0}
                for headers in ({"traceparent": CALLERS.traceparent}, {"traceparent": "nonsense"}, {}):
                    assert site.ask("POST", "/v1/completions", body, headers)[0] == 200
                wait_until(lambda: not made.load().requests, "the end of the answers")
            finally:
                site.close()
                made.stop()
    resource = {a.key: a.value.string_value for a in collector.requests[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "kitchen"
    spans = collector.spans()
    roots = [span for span in spans if span.name == "text_completion random"]
    assert [root.parent_span_id.hex() for root in roots] == [PARENT, "", ""]
    assert roots[0].trace_id.hex() == TRACE
    assert len({root.trace_id for root in roots}) == 3
    steps = {span.span_id for span in spans if span.name in ("prefill", "decode")}
    layers = [span for span in spans if span.name == "dispatch"]
    assert len(steps) == 3 * 2
    assert {layer.parent_span_id for layer in layers} == steps
    assert not any("w1" in str(span) for span in spans)


def test_a_collector_that_does_not_answer_delays_no_answer(
    random_bundle: Path, collector: _Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("bs_coordinator.tracing.export._LAST_SPANS_S", 0.1)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    collector.open.clear()
    with answer_traces(asked_for=False, model="random") as traces, server(random_bundle, traces) as (made, _):
        answer(made, [[1, 2, 3]], trace=TraceHeaders())  # returns though no span can be sent
        assert not collector.requests
        began_s = time.monotonic()
    assert time.monotonic() - began_s < PATIENCE_S
    assert "could not be sent" in caplog.text
    collector.open.set()
    ended = lambda: not any("OtelBatchSpan" in thread.name for thread in threading.enumerate())  # noqa: E731
    wait_until(ended, "the rest to be sent")


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with answer_traces(asked_for=False, model="m") as traces:
        assert traces == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with answer_traces(asked_for=True, model="m") as traces:
                assert traces == []
    assert caplog.text.count("turns them off") == 2


def test_the_log_names_the_collector_without_its_password(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://ada:sesame@127.0.0.1:9/v1/traces?token=sesame")
    with caplog.at_level(logging.INFO), answer_traces(asked_for=False, model="m"):
        assert "traces of answers go to http://127.0.0.1:9/v1/traces" in caplog.text
    assert "sesame" not in caplog.text


def test_without_the_extra_the_option_says_so_and_the_variable_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with (
        pytest.raises(MissingPackageError, match=r"pip install 'wdmoe\[tracing\]'"),
        answer_traces(asked_for=True, model="m"),
    ):
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING), answer_traces(asked_for=False, model="m") as traces:
        assert traces == []
    assert "wdmoe[tracing]" in caplog.text
