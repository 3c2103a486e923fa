"""Metrics: a real station's exposition against its own records, latencies by a clock moved by hand, the fleet."""

import queue
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from bs_coordinator import metrics
from bs_coordinator.base_station import open_base_station
from bs_coordinator.config import BaseStationConfig, SamplingConfig
from bs_coordinator.dispatch.dispatcher import Dispatcher
from bs_coordinator.engine.scheduler import Progress, Scheduler
from bs_coordinator.engine.sequence import StopReason, TokenEvent
from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord, StepRecord
from bs_coordinator.errors import AnswerError, BusyError, ContextLengthError, ExpertsLostError
from bs_coordinator.http.access import ApiKey
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.observers import AnswerObserver
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.requests import Request
from bs_coordinator.links import LinkSample
from bs_coordinator.metrics import StationMetrics
from bs_coordinator.nodes.registry import NodeRegistry
from common.clock import ManualClock
from common.errors import WdmoeError
from tests.http_site import HttpSite
from tests.needs import needs
from tests.node_threads import node_thread
from tests.waiting import PATIENCE_S
from wire import status
from wire.experts import UnitId
from wire.frames import NodeDurations
from wire.manifest import Dims
from wire.status import DeviceFacts, Holding, Machine, NodeStatus
from wire.telemetry import Clocks, Power, Telemetry, Thermal, Wifi, encode_telemetry
from wire.tensors import WireDtype
from wire.topics import Topics
from wire.transport import Message
from wire.transports.memory import MemoryBroker

KEY = "open sesame"
DASHBOARD = Path(metrics.__file__).with_name("grafana.json")
DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
OUR_LABELS = {"node", "kind", "phase", "stage", "reason", "path", "code", "le"}
INFO_LABELS = {"quantisation", "arch", "version", "profile", "provider", "model", "name", "wire"}

Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]


def samples_of(text: str) -> Samples:
    """Values by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def exposed(source: StationMetrics) -> Samples:
    return samples_of(source.exposition("")[0].decode())


class _Records(AnswerObserver):
    """Every step's record once, and the number of tokens."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.tokens = self.prompt_tokens = 0

    def progressed(self, request: Request, progress: Progress) -> None:
        if progress.step is not None and all(progress.step is not other for other in self.steps):
            self.steps.append(progress.step)
        if progress.answer.done:
            self.prompt_tokens += progress.answer.prompt_tokens
        self.tokens += len(progress.events)


@contextmanager
def served(bundle: Path) -> Iterator[tuple[HttpSite, _Records]]:
    """A station with two nodes in this process, over the in-memory transport, and its HTTP interface."""
    records = _Records()
    with (
        MemoryBroker() as broker,
        node_thread(bundle, broker.address, "a", "L*:E0-1"),
        node_thread(bundle, broker.address, "b", "L*:E2-3"),
        open_base_station(BaseStationConfig(bundle=bundle, wire=WireDtype.FP32), broker.address) as station,
    ):
        source = StationMetrics(station.dispatcher, model="random", preset={"preset": "exact", "wire": "fp32"})
        server = AnswerServer(
            Scheduler(station.model, max_live=2), station.new_sequence, max_waiting=0,
            dispatcher=station.dispatcher, observers=(records, source),
        )  # fmt: skip
        keys = [ApiKey("default", KEY)]
        app = http_app(server, station.tokenizer, model="random", keys=keys, stall_s=PATIENCE_S, metrics=source)
        # Both have their places before the first step, so that they share steps.
        done: queue.Queue[object] = queue.Queue()
        for ids in ([1, 2, 3, 4, 5], [6, 7, 8]):
            request = server.accept(SamplingConfig(max_tokens=6), done.put)
            server.submit(request, ids)
        with pytest.raises(BusyError):
            server.accept(SamplingConfig(), done.put)
        server.start()
        site = HttpSite(app, KEY)
        try:
            while server.load().requests:
                done.get(timeout=PATIENCE_S)
            yield site, records
        finally:
            site.close()
            server.stop()


@pytest.fixture(scope="module")
def scraped(random_bundle: Path) -> tuple[str, str, _Records]:
    """The exposition in both formats after two answers, and the records that it was made from."""
    with served(random_bundle) as (site, records):
        code, headers, text = site.text("GET", "/metrics")
        assert (code, headers["content-type"][:10]) == (200, "text/plain")
        site.key = "guess"
        assert site.text("GET", "/metrics")[0] == 401
        assert site.text("GET", "/../etc/passwd")[0] == 404
        site.key = KEY
        return text, site.text("GET", "/metrics")[2], records


def test_an_exposition_adds_up_to_the_records_of_the_steps(scraped: tuple[str, str, _Records]) -> None:
    text, later, records = scraped
    samples = samples_of(text)
    for phase in ("prefill", "decode"):
        steps = [step for step in records.steps if step.phase == phase]
        assert steps
        assert value(samples, "wdmoe_step_duration_seconds_count", phase=phase) == len(steps)
        assert value(samples, "wdmoe_step_duration_seconds_sum", phase=phase) == pytest.approx(
            sum(step.total_ns for step in steps) / 1e9
        )
        assert value(samples, "wdmoe_layer_dispatch_duration_seconds_count", phase=phase) == 2 * len(steps)
        for stage in ("trunk", "network", "compute", "wait", "framing"):
            assert value(samples, "wdmoe_step_stage_duration_seconds_sum", phase=phase, stage=stage) == pytest.approx(
                sum(getattr(step.split_ns(), stage) for step in steps) / 1e9
            )
    dispatches = [d for step in records.steps for layer in step.layers for d in layer.dispatches]
    for node in ("a", "b"):
        own = [d for d in dispatches if d.node == node]
        for name, expected in {
            "wdmoe_node_round_trip_duration_seconds_count": len(own),
            "wdmoe_node_round_trip_duration_seconds_sum": sum(d.round_trip_ns for d in own) / 1e9,
            "wdmoe_node_compute_duration_seconds_sum": sum(d.durations.compute_ns for d in own) / 1e9,
            "wdmoe_node_queue_duration_seconds_sum": sum(d.durations.queue_ns for d in own) / 1e9,
            "wdmoe_node_rows_total": sum(d.tokens for d in own),
            "wdmoe_node_down_bytes_total": sum(d.down_bytes for d in own),
            "wdmoe_node_up_bytes_total": sum(d.up_bytes for d in own),
            "wdmoe_node_round_trip_predicted_seconds_total": sum(d.predicted_ns for d in own) / 1e9,
            "wdmoe_node_round_trip_prediction_error_seconds_total": sum(
                abs(d.predicted_ns - d.round_trip_ns) for d in own
            )
            / 1e9,
        }.items():
            assert value(samples, name, node=node) == pytest.approx(expected), name
        assert value(samples, "wdmoe_node_up", node=node) == 1
        assert value(samples, "wdmoe_node_experts", node=node) == 4
        assert value(samples, "wdmoe_link_rtt_seconds", node=node) > 0
        assert value(samples, "wdmoe_link_probe_down_bytes_total", node=node) > 0
        assert value(samples, "wdmoe_link_probe_up_bytes_total", node=node) > 0
        assert value(samples, "wdmoe_link_probes_refused_total", node=node) >= 0
    assert value(samples, "wdmoe_experts") == 8
    assert value(samples, "wdmoe_experts_local") == 0
    assert value(samples, "wdmoe_experts_missing") == value(samples, "wdmoe_experts_lost") == 0
    assert value(samples, "wdmoe_prompt_tokens_total") == records.prompt_tokens == 8
    assert value(samples, "wdmoe_generated_tokens_total") == records.tokens
    assert value(samples, "wdmoe_requests_accepted_total") == 2
    assert value(samples, "wdmoe_requests_refused_total", reason="busy") == 1
    assert sum(n for (name, _), n in samples.items() if name == "wdmoe_requests_finished_total") == 2
    assert value(samples, "wdmoe_time_to_first_token_seconds_count") == 2
    assert value(samples, "wdmoe_inter_token_latency_seconds_count") == records.tokens - 2
    assert value(samples, "wdmoe_requests_running") == value(samples, "wdmoe_requests_waiting") == 0
    after = samples_of(later)
    assert value(after, "wdmoe_http_responses_total", path="/metrics", code="200") == 1
    assert value(after, "wdmoe_http_responses_total", path="/metrics", code="401") == 1
    assert value(after, "wdmoe_http_responses_total", path="other", code="404") == 1


def test_names_and_labels_follow_the_rules_of_prometheus(scraped: tuple[str, str, _Records]) -> None:
    for family in parse_text(scraped[0]):
        assert family.documentation.endswith("."), family.name
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"wdmoe(_[a-z0-9]+)*", family.name)
        assert not re.search(r"_(ms|mbps|mhz|kib|mib|milliseconds|percent)(_|$)", family.name), "base units only"
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name.endswith("_total")
            elif family.type == "gauge" and not sample.name.endswith("_info"):
                assert not re.search(r"_(total|count|sum|bucket)$", sample.name)
            allowed = OUR_LABELS | (INFO_LABELS if sample.name.endswith("_info") else set())
            assert set(sample.labels) <= allowed


@needs("promtool")
def test_promtool_finds_nothing_to_complain_about(scraped: tuple[str, str, _Records]) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=scraped[0], text=True, capture_output=True, timeout=PATIENCE_S
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


class _Answer:
    """What metrics read of an answer."""

    prompt_tokens = 7
    done = False


class _Station:
    """Metrics of a station without answers, with a clock moved by hand and nodes that are announced by the test."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.topics = Topics("test")
        self.dims = Dims(hidden=8, intermediate=16, layers=2, experts=4, top_k=2, vocab=10, max_positions=32)
        broker = MemoryBroker(clock=self.clock, latency_s=0.001)
        self.dispatcher = Dispatcher(
            broker.connect(broker.address, "bs"), self.topics, NodeRegistry(self.dims, "m"),
            dtype=WireDtype.FP32, timeout_s=1.0, clock=self.clock,
        )  # fmt: skip
        self.broker = broker
        self.metrics = StationMetrics(self.dispatcher, clock=self.clock)

    def announce(self, node: str, experts: str, state: Any = "online") -> None:
        document = NodeStatus(
            schema=1, node=node, boot_id="b0", state=state, since_unix_ms=1,
            holding=Holding(
                experts=experts, model_sha256="m", dims=self.dims, quantisation="int4 b32", resident_bytes=5
            ),
            machine=Machine(
                host="h", pid=1, arch="aarch64", cpus=4, threads=4, ram_bytes=1000, available_bytes=400,
                wdmoe="0.1", onnxruntime="1",
            ),
            device=DeviceFacts(profile="pi5", because="", provider="cpu"),
        )  # fmt: skip
        self.broker.publish(self.topics.status(node), status.encode_status(document))
        self.look()

    def look(self, seconds: float = 1.0) -> Samples:
        """What is exposed after this long."""
        self.dispatcher.pump(0.01)
        self.clock.advance_ns(int(1e9 * seconds))
        self.metrics.polled()
        return exposed(self.metrics)

    def accept(self) -> Request:
        request = Request(SamplingConfig(), lambda update: None, self.clock.monotonic_s(), True)
        self.metrics.accepted(request)
        return request

    def progress(
        self, request: Request, seconds: float, tokens: int, *, stop: StopReason | None = None,
        step: StepRecord | None = None, error: WdmoeError | None = None, degraded: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.clock.advance_ns(int(1e9 * seconds))
        steps = (step,) if step else ()
        events = [
            TokenEvent(
                1, "x", steps if i == 0 else (), stop if i == tokens - 1 else None, degraded=i in degraded
            )
            for i in range(tokens)
        ]  # fmt: skip
        answer: Any = _Answer()
        self.metrics.progressed(request, Progress(answer, events, error, step))


def _step(*, drafted: int = 0, accepted: int = 0, node: str = "a") -> StepRecord:
    dispatch = DispatchRecord(node, (0,), 1, 0, 3_000_000, NodeDurations(compute_ns=1_000_000), 100, 50, 2_000_000)
    layers = tuple(LayerRecord(i, 1_000_000, 4_000_000, (), (dispatch,)) for i in range(2))
    return StepRecord("decode", 0, 1, 12_000_000, 1_000_000, layers, drafted, accepted)


def test_latencies_are_those_of_the_callers_tokens() -> None:
    station = _Station()
    request = station.accept()
    assert value(exposed(station.metrics), "wdmoe_requests_waiting") == 1
    station.progress(request, 1.0, 0)
    assert value(exposed(station.metrics), "wdmoe_requests_running") == 1
    station.progress(request, 1.0, 1)
    step = _step(drafted=4, accepted=2)
    station.progress(request, 0.6, 3, step=step, degraded=(0, 2))
    station.progress(request, 0.2, 1, stop="eos")
    station.metrics.ended(request, None)
    samples = exposed(station.metrics)
    for name, count, total in [
        ("time_to_first_token_seconds", 1, 2.0),
        ("inter_token_latency_seconds", 4, 0.8),
        ("time_per_output_token_seconds", 1, 0.2),
        ("request_duration_seconds", 1, 2.8),
    ]:
        assert value(samples, f"wdmoe_{name}_count") == count
        assert value(samples, f"wdmoe_{name}_sum") == pytest.approx(total)
    # Three tokens that come at once after 0.6 s are 0.2 s apart, as is the last.
    assert value(samples, "wdmoe_inter_token_latency_seconds_bucket", le="0.15") == 0
    assert value(samples, "wdmoe_inter_token_latency_seconds_bucket", le="0.3") == 4
    assert value(samples, "wdmoe_requests_finished_total", reason="eos") == 1
    assert value(samples, "wdmoe_draft_tokens_offered_total") == 4
    assert value(samples, "wdmoe_draft_tokens_accepted_total") == 2
    assert value(samples, "wdmoe_prompt_tokens_total") == 7
    assert value(samples, "wdmoe_generated_tokens_total") == 5
    assert value(samples, "wdmoe_degraded_tokens_total") == 2
    assert value(samples, "wdmoe_requests_running") == 0


@pytest.mark.parametrize(
    ("error", "name", "reason"),
    [
        (ContextLengthError("long"), "failed", "context"),
        (AnswerError("nan"), "failed", "answer"),
        (ExpertsLostError("gone"), "failed", "experts_lost"),
        (WdmoeError("stopped"), "failed", "other"),
        (None, "cancelled", None),
    ],
)
def test_requests_end_for_a_reason(error: WdmoeError | None, name: str, reason: str | None) -> None:
    station = _Station()
    for tokens in (0, 1):
        request = station.accept()
        if tokens:
            station.progress(request, 0.1, tokens, error=error)
        station.metrics.ended(request, error)
    samples = exposed(station.metrics)
    labels = {"reason": reason} if reason else {}
    assert value(samples, f"wdmoe_requests_{name}_total", **labels) == 2
    assert value(samples, "wdmoe_requests_waiting") == value(samples, "wdmoe_requests_running") == 0
    assert value(samples, "wdmoe_request_duration_seconds_count") == 0


def test_a_step_that_several_answers_share_counts_once() -> None:
    station = _Station()
    first, second = station.accept(), station.accept()
    shared, alone = _step(), _step()
    for request, step in [(first, shared), (second, shared), (first, alone)]:
        station.progress(request, 0.1, 1, step=step)
    samples = exposed(station.metrics)
    assert value(samples, "wdmoe_step_duration_seconds_count", phase="decode") == 2
    assert value(samples, "wdmoe_node_round_trip_duration_seconds_count", node="a") == 4
    assert value(samples, "wdmoe_node_round_trip_prediction_error_seconds_total", node="a") == pytest.approx(0.004)


def test_the_fleet_is_described_by_statuses_estimates_and_telemetry() -> None:
    station = _Station()
    station.announce("a", "L*:E0-1")
    station.announce("b", "L*:E2-3")
    now_s = station.clock.perf_ns() / 1e9
    for i in range(20):
        station.dispatcher.links.observe([LinkSample(now_s + i * 1e-3, "a", 1000 + 500 * i, 100, 0.02, 0.0)])
    sent = Telemetry(
        schema=1, node="a", boot_id="b0", sequence=0, unix_ns=1, sampling_ms=1.0,
        wifi=Wifi(
            interface="wlan0", connected=True, ssid="home", bssid="aa:bb", rssi_dbm=-61, up_phy_mbps=80.0, roams=2
        ),
        thermal=Thermal(soc_celsius=71.5, throttling_now="under-voltage"), power=Power(board_watts=4.5),
        clocks=Clocks(cpu_slowest_mhz=1500.0, load_1min=0.5),
    )  # fmt: skip
    arrived_ns = station.clock.perf_ns()
    station.dispatcher.telemetry.put("a", Message(station.topics.telemetry("a"), encode_telemetry(sent), arrived_ns))
    station.dispatcher.health.failed("b", now_s, "it is late")
    samples = station.look()
    (estimate,) = (known for known in station.dispatcher.links.estimates(now_s) if known.node == "a")
    for name, expected in {
        "node_temperature_celsius": 71.5, "node_throttled": 1, "node_power_watts": 4.5, "node_load1": 0.5,
        "node_cpu_slowest_hertz": 1.5e9, "node_wifi_signal_dbm": -61, "node_wifi_up_phy_bytes_per_second": 1e7,
        "node_wifi_roams_total": 2, "node_memory_bytes": 1000, "node_memory_available_bytes": 400,
        "node_experts": 4, "node_usable": 1,
        "link_rtt_seconds": estimate.link.rtt_s, "link_rtt_stddev_seconds": estimate.link.rtt_std_s,
        "link_down_bytes_per_second": estimate.link.down_mbps * 125_000, "link_samples_total": 20, "link_stale": 0,
    }.items():  # fmt: skip
        assert value(samples, f"wdmoe_{name}", node="a") == pytest.approx(expected, rel=1e-3), name
    assert value(samples, "wdmoe_node_usable", node="b") == 0
    assert value(samples, "wdmoe_node_failures_total", node="b", kind="failed") == 1
    facts = {"quantisation": "int4 b32", "arch": "aarch64", "version": "0.1", "profile": "pi5", "provider": "cpu"}
    assert value(samples, "wdmoe_node_info", node="a", **facts) == 1
    # Neither what was not measured nor the names of networks.
    assert not any("supply" in name and dict(labels) for name, labels in samples)
    assert not any("home" in dict(labels).values() for _, labels in samples)
    assert ("wdmoe_node_temperature_celsius", frozenset({("node", "a")})) not in station.look(31.0), "it is too old"


def test_experts_on_the_base_station_are_counted() -> None:
    station = _Station()
    station.dispatcher.registry.hold_locally(frozenset(UnitId(1, expert) for expert in range(3)))
    samples = station.look()
    assert value(samples, "wdmoe_experts_local") == 3
    assert value(samples, "wdmoe_experts_missing") == 5


def test_a_node_that_left_is_shown_as_such_and_then_forgotten() -> None:
    station = _Station()
    station.announce("a", "L*:E*")
    request = station.accept()
    station.progress(request, 0.1, 1, step=_step())
    station.announce("a", "L*:E*", "offline")
    samples = station.look()
    assert value(samples, "wdmoe_node_up", node="a") == 0
    assert value(samples, "wdmoe_experts_lost") == 1
    assert value(samples, "wdmoe_experts_missing") == 8
    assert value(samples, "wdmoe_node_rows_total", node="a") == 2
    assert not [labels for _, labels in station.look(301.0) if ("node", "a") in labels]
    station.progress(request, 0.1, 1, step=_step())
    assert value(exposed(station.metrics), "wdmoe_node_rows_total", node="a") == 2


def test_prometheus_may_ask_for_openmetrics() -> None:
    body, content_type = _Station().metrics.exposition("application/openmetrics-text; version=1.0.0, text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text")
    assert {"wdmoe_requests_accepted", "wdmoe"} <= {family.name for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]


def _names(text: str) -> set[str]:
    """Names of all time series that an exposition declares, also of those without a value."""
    endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}
    return {f.name + ending for f in parse_text(text) for ending in endings.get(f.type, ("",))}


def _queries(dashboard: Any) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_only_for_what_exists(scraped: tuple[str, str, _Records]) -> None:
    dashboard = msgspec.json.decode(DASHBOARD.read_bytes())
    names, queries = _names(scraped[0]), _queries(dashboard)
    assert len(queries) > 30
    for query in queries:
        assert set(re.findall(r"\b(?:wdmoe|process)_\w+", query)) <= names
        labels = re.findall(r"\b(?:by|ignoring) \(?([\w, ]+)\)", query)
        assert {label for some in labels for label in some.split(", ")} <= OUR_LABELS
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", msgspec.json.encode(dashboard["panels"]).decode()))
    assert used - {"__rate_interval"} == variables


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    dashboard = msgspec.json.decode(DASHBOARD.read_bytes())
    assert {"title", "uid", "schemaVersion", "templating", "time", "panels"} <= dashboard.keys()
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in {"row", "timeseries", "stat", "state-timeline"}
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in own) < 24
        assert not own & cells, f"{panel['title']} overlaps another panel"
        cells |= own
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            ids = [target["refId"] for target in panel["targets"]]
            assert len(set(ids)) == len(ids) > 0


@needs("promtool")
def test_promtool_understands_the_dashboards_queries(tmp_path: Path) -> None:
    queries = _queries(msgspec.json.decode(DASHBOARD.read_bytes()))
    rules = [
        {"record": f"query:{i}", "expr": query.replace("$__rate_interval", "1m")} for i, query in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"  # JSON is YAML
    file.write_bytes(msgspec.json.encode({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = subprocess.run(["promtool", "check", "rules", file], text=True, capture_output=True, timeout=PATIENCE_S)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(queries)} rules found" in checked.stdout


def test_every_metric_is_documented_and_every_documented_metric_exists(scraped: tuple[str, str, _Records]) -> None:
    names = {
        f.name + {"counter": "_total"}.get(f.type, "") for f in parse_text(scraped[0]) if f.name.startswith("wdmoe")
    }
    assert set(re.findall(r"`(wdmoe_\w+)`", DOCUMENT.read_text(encoding="utf-8"))) == names
