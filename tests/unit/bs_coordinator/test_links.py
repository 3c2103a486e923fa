"""Estimators against links whose truth is known, in simulated time."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.links import LinkMonitor, LinkSample, NodeEstimate, Probe, Probing
from bs_coordinator.links.broker_sockets import parse_ss
from bs_coordinator.links.log import link_log, read_link_log
from bs_coordinator.links.packet_train import ArrivalTiming, RateWindow, dispersion_s, plan_train
from bs_coordinator.links.replay import replay
from bs_coordinator.selection.forecast import LayerForecast
from common.errors import StorageError
from wire.status import SocketFacts

WORK = 1216, 1232
"""Bytes there and back of one fp16 hidden state of 576."""


@dataclass(frozen=True)
class Link:
    """The truth about one link, and the distribution of its disturbances."""

    rtt_ms: float
    down_mbps: float
    up_mbps: float
    jitter_ms: float = 0.1
    loss: float = 0.0

    def network_s(self, down_bytes: int, up_bytes: int, rng: np.random.Generator) -> float:
        transfer_ms = 8e-3 * (down_bytes / self.down_mbps + up_bytes / self.up_mbps)
        lost_ms = 210.0 if rng.random() < self.loss else 0.0
        return 1e-3 * (self.rtt_ms + transfer_ms + self.jitter_ms * abs(rng.normal()) + lost_ms)

    def arrivals(self, probe: Probe, sent_s: float, rng: np.random.Generator) -> list[tuple[float, bool]]:
        """Of a train's answers: one after the other at the slower direction's rate, delayed in order."""
        per_message_s = 8e-6 * max((48 + probe.down_bytes) / self.down_mbps, (80 + probe.up_bytes) / self.up_mbps)
        due_s, last_s, result = sent_s + 1e-3 * self.rtt_ms, 0.0, []
        for _ in range(probe.count):
            due_s += per_message_s
            lost_s = 0.21 if rng.random() < self.loss else 0.0
            last_s = max(last_s, due_s + 1e-3 * self.jitter_ms * abs(rng.normal()) + lost_s)
            result.append((last_s, True))
        return result

    def expected_s(self, down_bytes: int, up_bytes: int) -> float:
        return 1e-3 * (
            self.rtt_ms + 8e-3 * (down_bytes / self.down_mbps + up_bytes / self.up_mbps) + 0.8 * self.jitter_ms
        )


def train_sample(probe: Probe, sent_s: float, last_s: float, down: int, up: int, took_s: float) -> LinkSample:
    """What the prober makes of a train's answers: the bytes and the time between those that count, and of all."""
    n_bytes = probe.count * (48 + probe.down_bytes if probe.down_bytes else 80 + probe.up_bytes)
    return LinkSample(
        last_s, probe.node, down, up, took_s, 0.0, train=True, train_bytes=n_bytes, train_s=last_s - sent_s
    )


class World:
    """One base station that asks its nodes layer after layer and probes in between, in simulated time."""

    def __init__(self, links: dict[str, Link], seed: int = 0, monitor: LinkMonitor | None = None) -> None:
        self.links = links
        self.rng = np.random.default_rng(seed)
        self.now_s = 100.0
        self.monitor = monitor or LinkMonitor()
        self.errors: list[float] = []
        self.air_s = 0.0

    def layer(self, nodes: Sequence[str], sizes: tuple[int, int] = WORK, rows: int = 1) -> None:
        samples = []
        for node in nodes:
            link = self.links[node]
            predicted_s = self.monitor.link_s(node, down_bytes=sizes[0], up_bytes=sizes[1])
            self.errors.append(predicted_s / link.expected_s(*sizes) - 1)
            node_s = 1e-3 * (0.2 + 0.5 + 0.1 * rows)
            took_s = node_s + link.network_s(*sizes, self.rng)
            samples.append(LinkSample(self.now_s + took_s, node, *sizes, took_s, node_s, experts=1, rows=rows))
        self.now_s = max(s.time_s for s in samples) + 2e-3
        self.monitor.observe(samples)
        self.probe()

    def probe(self) -> None:
        probe = self.monitor.next_probe(self.links, self.now_s)
        if probe:
            link = self.links[probe.node]
            if probe.count == 1:
                sizes = 48 + probe.down_bytes, 80 + probe.up_bytes
                took_s = link.network_s(*sizes, self.rng)
                self.monitor.observe([LinkSample(self.now_s + took_s, probe.node, *sizes, took_s + 1e-4, 1e-4)])
                return
            arrivals = link.arrivals(probe, self.now_s, self.rng)
            self.air_s += probe.count * 8e-6 * (probe.down_bytes / link.down_mbps + probe.up_bytes / link.up_mbps)
            found = dispersion_s(arrivals, probe.lead)
            if found is None:
                self.monitor.answered(probe.node)
                return
            gaps, total_s = found
            down, up = (gaps * (48 + probe.down_bytes), 0) if probe.down_bytes else (0, gaps * (80 + probe.up_bytes))
            self.monitor.observe([train_sample(probe, self.now_s, arrivals[-1][0], down, up, total_s)])

    def idle(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.01
            self.probe()

    def estimate(self, node: str) -> NodeEstimate:
        return next(e for e in self.monitor.estimates(self.now_s) if e.node == node)


MIXED = {"a": Link(4, 20, 10), "b": Link(8, 50, 25), "c": Link(14, 100, 80)}


def _median_error(errors: Sequence[float]) -> float:
    return float(np.median(np.abs(errors)))


@pytest.mark.parametrize("seed", range(5))
def test_links_become_known_from_one_message_size_and_probes(seed: int) -> None:
    world = World(MIXED, seed)
    world.idle(1.0)
    for _ in range(300):
        world.layer("abc")
    assert _median_error(world.errors[-300:]) < 0.05
    for node, truth in MIXED.items():
        link = world.estimate(node).link
        assert link.rtt_s == pytest.approx(1e-3 * truth.rtt_ms, rel=0.15)
        assert link.down_mbps == pytest.approx(truth.down_mbps, rel=0.15)
        assert link.up_mbps == pytest.approx(truth.up_mbps, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_a_step_is_followed_within_64_messages(seed: int) -> None:
    world = World({"a": Link(4, 50, 50)}, seed)
    world.idle(1.0)
    for _ in range(200):
        world.layer("a")
    world.links["a"] = Link(4, 20, 20)
    for _ in range(64):
        world.layer("a")
    assert _median_error(world.errors[-16:]) < 0.1
    link = world.estimate("a").link
    assert link.down_mbps == pytest.approx(20, rel=0.15)
    assert link.up_mbps == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_a_change_of_all_links_is_followed_although_requests_hardly_show_it(seed: int) -> None:
    """A step of the rates adds 0.6 ms to a round trip of 4.4 ms with 0.4 ms of jitter."""
    names = [f"n{i}" for i in range(8)]
    world = World(dict.fromkeys(names, Link(4, 50, 50, jitter_ms=0.4)), seed)
    world.idle(2.0)
    for _ in range(400):
        world.layer(world.rng.choice(names, 2, replace=False).tolist())
    world.links = dict.fromkeys(names, Link(4, 20, 20, jitter_ms=0.4))
    for _ in range(64 * 4):  # 64 messages on each link
        world.layer(world.rng.choice(names, 2, replace=False).tolist())
    off = [
        max(abs(world.estimate(n).link.down_mbps / 20 - 1), abs(world.estimate(n).link.up_mbps / 20 - 1)) for n in names
    ]
    assert np.median(off) < 0.15
    assert max(off) < 0.35


@pytest.mark.parametrize(
    ("disturbed", "most"),
    [({"jitter_ms": 2.0}, 0.10), ({"loss": 0.01}, 0.05), ({"jitter_ms": 1.0, "loss": 0.05}, 0.20)],
)
def test_outliers_do_not_drag_the_estimate(disturbed: dict[str, float], most: float) -> None:
    world = World({n: replace(link, **disturbed) for n, link in MIXED.items()}, seed=1)
    world.idle(1.0)
    for _ in range(400):
        world.layer("abc")
    assert _median_error(world.errors[-600:]) < most


def test_silence_raises_uncertainty_and_the_silent_node_is_probed_first() -> None:
    world = World(MIXED)
    world.idle(1.0)
    for _ in range(100):
        world.layer("abc")
    sure = world.estimate("a").link
    world.now_s += 60
    forecast = _forecast(world)
    monitor = world.monitor
    silent = world.estimate("a")
    assert silent.stale
    assert silent.link.rtt_std_s > 2 * sure.rtt_std_s
    probe = monitor.next_probe(["a", "b", "c"], world.now_s)
    assert probe is not None
    world.layer("bc")
    trusted = _forecast(world)
    # What is known of the others is fresh now; a silent node is not believed to be better than the typical one.
    assert trusted.fixed_s[0] >= np.median(trusted.fixed_s[1:]) > 0
    assert (forecast.fixed_s > 0).all()


def test_a_probe_without_an_answer_is_not_repeated_at_once() -> None:
    monitor = LinkMonitor()
    sent = [monitor.next_probe(["dead"], 100 + 0.01 * i) for i in range(400)]
    # 4 s, and one per two seconds at most.
    assert 1 <= sum(p is not None for p in sent) <= 3


def test_probes_stay_a_small_share_of_an_idle_link() -> None:
    world = World({"a": Link(4, 20, 20)})
    world.idle(10.0)
    world.air_s = 0.0
    world.idle(20.0)
    assert world.air_s / 20 < 0.02


def test_trains_stay_a_small_share_of_a_link_in_use() -> None:
    world = World(MIXED)
    world.idle(1.0)
    for _ in range(200):
        world.layer("abc")
    world.air_s, began_s = 0.0, world.now_s
    for _ in range(1000):
        world.layer("abc")
    directions = 2 * len(MIXED)
    assert 0 < world.air_s / (world.now_s - began_s) / directions < 0.02


def test_compute_time_is_learnt_from_sizes() -> None:
    world = World({"a": Link(4, 50, 50)})
    for rows in [1, 1, 4, 1, 1, 16, 1, 1, 64] * 20:
        world.layer("a", (64 + 1160 * rows, 80 + 1152 * rows), rows)
    monitor = world.monitor
    for rows in (1, 16, 64):
        whole_s = monitor.predict_s("a", down_bytes=100, up_bytes=100, experts=1, rows=rows)
        link_s = monitor.link_s("a", down_bytes=100, up_bytes=100)
        assert whole_s - link_s == pytest.approx(1e-3 * (0.7 + 0.1 * rows), rel=0.05)


def test_shared_air_is_not_mistaken_for_slow_links() -> None:
    """Three equal links on one channel: each answer waits for frames of the others, none of them is slow."""
    truth = Link(2, 20, 20, jitter_ms=0.05)
    world = World(dict.fromkeys("abc", truth), monitor=LinkMonitor(shared_air=True))
    world.idle(2.0)
    sizes = 6000, 6000
    air_s = 8e-6 * sizes[0] / 20
    for _ in range(200):
        samples = []
        for i, node in enumerate("abc"):
            # Requests one after the other, then answers one after the other: the last one ends at six air times.
            took_s = 1e-3 * (truth.rtt_ms + abs(world.rng.normal(0, 0.05))) + (4 + i) * air_s
            samples.append(LinkSample(world.now_s + took_s, node, *sizes, took_s + 1e-3, 1e-3, experts=1, rows=5))
        world.now_s += 0.05
        world.monitor.observe(samples)
        world.probe()
    for node in "abc":
        assert world.estimate(node).link.down_mbps > 10


@pytest.mark.parametrize("host_ns_per_byte", [0.0, 10.0, 40.0])
def test_cross_traffic_is_not_mistaken_for_slow_links(host_ns_per_byte: float) -> None:
    """Prompts ask all nodes at once, through hosts that carry one message after the other."""
    names = [f"n{i}" for i in range(8)]
    world = World(dict.fromkeys(names, Link(5, 100, 100, jitter_ms=0.1)))
    world.idle(2.0)
    for _ in range(100):
        world.layer(world.rng.choice(names, 2, replace=False).tolist())
    alarms = {n: world.monitor._nodes[n].link.alarms for n in names}
    for _ in range(30):
        rows = dict(zip(names, world.rng.integers(5, 30, len(names)).tolist(), strict=True))
        sizes = {n: (64 + 1160 * r, 80 + 1152 * r) for n, r in rows.items()}
        samples = []
        for n in names:
            others = sum(sum(sizes[m]) for m in names if m != n)
            network_s = world.links[n].network_s(*sizes[n], world.rng) + 1e-9 * host_ns_per_byte * others
            took_s = network_s + 1e-3
            samples.append(LinkSample(world.now_s + took_s, n, *sizes[n], took_s, 1e-3, experts=1, rows=rows[n]))
        world.now_s += 0.05
        world.monitor.observe(samples)
    assert {n: world.monitor._nodes[n].link.alarms for n in names} == alarms
    world.errors.clear()
    for _ in range(8):
        world.layer(world.rng.choice(names, 2, replace=False).tolist())
    assert _median_error(world.errors) < 0.08


def _forecast(world: World) -> LayerForecast:
    return world.monitor.forecast(
        0, list("abc"), np.array([0, 1, 2]), now_s=world.now_s, frame_bytes=(48, 80), row_bytes=(1160, 1152)
    )


def test_the_forecast_is_the_sum_that_the_estimates_stand_for() -> None:
    world = World(MIXED)
    world.idle(1.0)
    for _ in range(200):
        world.layer("abc")
    forecast = _forecast(world)
    for i, node in enumerate("abc"):
        rows = np.zeros(3, np.int64)
        rows[i] = 7
        alone_s = world.monitor.predict_s(node, down_bytes=48 + 7 * 1160, up_bytes=80 + 7 * 1152, experts=1, rows=7)
        assert forecast.layer_s(rows, (rows > 0).astype(np.int64)) == pytest.approx(alone_s, rel=1e-6)


def test_tcp_info_bounds_and_seeds_the_estimate() -> None:
    monitor = LinkMonitor()
    facts = SocketFacts(endpoint="h:1", min_rtt_us=20_000, delivery_bytes_per_s=1_250_000, app_limited=False)
    for towards_node in (True, False):
        monitor.anchor("a", facts, towards_node=towards_node, time_s=1.0)
    (estimate,) = monitor.estimates(1.0)
    assert estimate.link.rtt_s == pytest.approx(0.0204, rel=0.25)
    assert estimate.link.down_mbps == pytest.approx(10, rel=0.25)
    assert estimate.link.up_mbps == pytest.approx(10, rel=0.25)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"),
            st.integers(0, 1 << 20),
            st.integers(0, 1 << 20),
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(allow_nan=True, allow_infinity=True),
            st.integers(0, 64),
        ),
        max_size=60,
    )
)
def test_estimates_stay_plausible_for_any_samples(raw: list[tuple[str, int, int, float, float, int]]) -> None:
    monitor = LinkMonitor()
    for i, (node, down, up, round_trip_s, node_s, rows) in enumerate(raw):
        monitor.observe([LinkSample(float(i), node, down, up, round_trip_s, node_s, experts=min(rows, 2), rows=rows)])
        predicted_s = monitor.predict_s(node, down_bytes=1000, up_bytes=1000, experts=1, rows=1)
        assert 0 < predicted_s < math.inf
    for estimate in monitor.estimates(float(len(raw))):
        link = estimate.link
        for value in (link.rtt_s, link.rtt_std_s, link.down_mbps, link.up_mbps, link.noise_s, estimate.row_s):
            assert 0 < value < math.inf


def test_a_log_replays_to_the_same_estimates(tmp_path: Path) -> None:
    path = tmp_path / "links.jsonl"
    with link_log(path) as log:
        world = World(MIXED, monitor=LinkMonitor(log=log))
        world.idle(1.0)
        for _ in range(50):
            world.layer("abc")
    path.write_bytes(path.read_bytes() + b'{"time_s":1')  # cut off by a crash
    replayed = replay(read_link_log(path))
    last_s = max(s.time_s for s in read_link_log(path))
    # A log contains samples, not what probes took.
    estimates = [replace(estimate, probing=Probing()) for estimate in world.monitor.estimates(last_s)]
    assert [r.estimate for r in replayed] == estimates
    assert all(r.error < 0.05 for r in replayed)


@pytest.mark.parametrize("line", [b"no json\n", b'{"time_s": 1}\n', b"[]\n"])
def test_a_damaged_log_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "links.jsonl"
    path.write_bytes(line)
    with pytest.raises(StorageError, match=r"links\.jsonl, line 1"):
        list(read_link_log(path))


SS = (
    "ESTAB 0 0 10.0.0.1:1883 10.0.0.2:40001 cubic rtt:4.1/0.2 minrtt:3.907 delivery_rate 41000000bps app_limited\n"
    "ESTAB 0 0 [::ffff:10.0.0.1]:1883 [::ffff:10.0.0.3]:40002 cubic minrtt:8 delivery_rate 8000000bps\n"
    "ESTAB 0 0 10.0.0.1:1883 10.0.0.4:40003 cubic rtt:4.1/0.2\n"
    "garbage\n"
)


def test_the_output_of_ss_is_understood() -> None:
    assert parse_ss(SS) == {
        "10.0.0.2:40001": SocketFacts(
            endpoint="10.0.0.2:40001", min_rtt_us=3907, delivery_bytes_per_s=5_125_000, app_limited=True
        ),
        "10.0.0.3:40002": SocketFacts(
            endpoint="10.0.0.3:40002", min_rtt_us=8000, delivery_bytes_per_s=1_000_000, app_limited=False
        ),
    }


def test_fields_of_ss_that_grow_lose_only_their_own_line() -> None:
    doubled = SS.replace("minrtt:3.907", "new:1/2 minrtt:3.907 minrtt:9 tcp-ulp-tls version: 1.3")
    assert parse_ss(doubled) == parse_ss(SS)
    for part in ("minrtt:3.907", "delivery_rate 41000000bps"):
        assert part in SS
        for bad in (re.sub(r"[\d.]+", "9" * 5000, part), re.sub(r"[\d.]+", "1.2.3", part), part + "9" * 5000):
            assert list(parse_ss(SS.replace(part, bad))) in (["10.0.0.3:40002"], ["10.0.0.2:40001", "10.0.0.3:40002"])


@given(st.floats(1e-9, 1.0), st.floats(1e-4, 10.0), st.floats(0, 10.0))
def test_trains_stay_within_limits_for_any_estimate(s_per_byte: float, rtt_s: float, noise_s: float) -> None:
    """The first message that counts ends in TCP's second window, unless the whole train fits into the first."""
    train = plan_train(s_per_byte, rtt_s, noise_s)
    window, framed = 10 * 1448, train.message_bytes + 128
    assert 1000 < train.message_bytes <= 18 << 10
    assert train.lead + 5 == train.count <= 12
    assert train.count * framed <= window if train.lead == 0 else (train.lead + 1) * framed > window


@given(st.floats(1e-4, 0.1), st.lists(st.floats(1e-5, 1.0), max_size=6), st.integers(0, 3))
def test_a_trains_rate_is_that_between_its_arrivals(gap_s: float, lead: list[float], late: int) -> None:
    """Whatever happens before the messages that count, and if one of those in between is late."""
    times = 50 + np.concatenate(([0.0], np.cumsum([*lead, *[gap_s] * 4])))
    if late:
        times[len(lead) + late] = times[len(lead) + late + 1]
    found = dispersion_s([(float(t), True) for t in times], len(lead))
    assert found is not None
    assert found[0] == 4
    assert found[1] == pytest.approx(4 * gap_s, rel=1e-6)


@given(st.lists(st.floats(-0.9, 9.0), min_size=1, max_size=2))
def test_a_long_train_counts_for_more_than_short_ones(late: list[float]) -> None:
    """Of trains of 20 kB whose times are off, and one of 100 kB at 50 Mbit/s."""
    window = RateWindow()
    for i, off in enumerate(late):
        window.observe(100.0 + i, 20e3 * 1.6e-7 * (1 + off), 20_000)
    assert not window.observe(110.0, 100e3 * 1.6e-7, 100_000)
    assert window.s_per_byte == pytest.approx(1.6e-7)
    assert not window.odd


def test_three_trains_that_agree_replace_longer_ones() -> None:
    window = RateWindow()
    for i in range(5):
        window.observe(100.0 + i, 100e3 * 1.6e-7, 100_000)
    changed = [window.observe(110.0 + i, 20e3 * 4e-7, 20_000) for i in range(3)]
    assert changed == [False, False, True]
    assert window.s_per_byte == pytest.approx(4e-7)


def test_arrivals_that_are_not_sure_do_not_count() -> None:
    piled_up = [(1.0, False), (1.0001, False), (1.0002, False), (1.003, True), (1.006, True), (1.009, True)]
    for arrivals, lead, messages, took_s in (
        (piled_up, 1, 2, 0.006),
        ([(1.0, True), (1.004, True), (1.005, False), (1.008, True)], 0, 3, 0.008),
    ):
        found = dispersion_s(arrivals, lead)
        assert found is not None
        assert found[0] == messages
        assert found[1] == pytest.approx(took_s)
    assert dispersion_s(piled_up[:4], 0) is None
    assert dispersion_s([], 0) is None


def test_arrival_times_are_accurate_only_if_the_socket_was_polled_in_time() -> None:
    timing = ArrivalTiming()
    moments = [
        (0.0, 3.0, True),  # waited 3 ms for it
        (3.1, 3.2, True),  # it came while the last one was handled
        (9.0, 9.1, False),  # the socket was not polled for 6 ms
        (9.2, 9.3, False),  # this one may have waited as well
        (9.4, 11.0, True),
    ]
    for asked_ms, read_ms, sure in moments:
        timing.read(int(1e6 * asked_ms), int(1e6 * read_ms))
        assert timing.sure == sure


def test_a_jump_of_one_link_causes_probes_of_the_others() -> None:
    world = World(dict.fromkeys("ab", Link(4, 50, 50)))
    world.idle(1.0)
    for _ in range(200):
        world.layer("ab")
    world.links = dict.fromkeys("ab", Link(4, 10, 10))
    for _ in range(100):
        world.layer("a")  # b gets no request
    assert world.estimate("b").link.down_mbps == pytest.approx(10, rel=0.15)


def test_trains_replace_the_kernels_delivery_rate() -> None:
    world = World({"a": Link(4, 20, 20)})
    world.idle(2.0)
    burst = SocketFacts(endpoint="h:1", min_rtt_us=4000, delivery_bytes_per_s=100_000_000, app_limited=True)
    world.monitor.anchor("a", burst, towards_node=True, time_s=world.now_s)
    assert world.estimate("a").link.down_mbps == pytest.approx(20, rel=0.15)


def test_a_forecast_does_not_depend_on_when_others_were_made() -> None:
    """Costs are kept between forecasts: each kind of news about a node has to renew its own."""

    def forecast(monitor: LinkMonitor) -> list[list[float]]:
        made = monitor.forecast(0, list(MIXED), np.arange(3), now_s=200.0, frame_bytes=(48, 80), row_bytes=(1160, 1152))
        return [made.fixed_s.tolist(), made.expert_s.tolist(), made.row_air_s.tolist(), made.row_compute_s.tolist()]

    def after(news: int, *, asked: bool) -> list[list[float]]:
        monitor = LinkMonitor()
        facts = SocketFacts(endpoint="a:1", min_rtt_us=9000, delivery_bytes_per_s=500_000, app_limited=False)
        work = LinkSample(101.0, "a", *WORK, 0.02, 2e-3, experts=1, rows=1)
        learn: list[Callable[[], object]] = [
            lambda: monitor.anchor("a", facts, towards_node=True, time_s=100.0),
            lambda: monitor.observe([work]),
            lambda: monitor.observe([LinkSample(102.0, "a", *WORK, 0.05, 3e-2, experts=2, rows=1, load_s=2e-2)]),
            lambda: monitor.observe([LinkSample(103.0, "a", 14_000, 0, 0.01, 0.0, train=True)]),
        ]
        for take in learn[:news]:
            if asked:
                forecast(monitor)
            take()
        return forecast(monitor)

    forecasts = [after(news, asked=True) for news in range(5)]
    assert forecasts == [after(news, asked=False) for news in range(5)]
    assert all(before != now for before, now in itertools.pairwise(forecasts))
