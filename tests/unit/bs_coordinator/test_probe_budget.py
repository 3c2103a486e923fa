"""The budget of probes against plain sums over every window, and fleets that would like to send more."""

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bs_coordinator.links import LinkMonitor, LinkSample, Probe
from bs_coordinator.links.budget import (
    FIRST_BYTES,
    IDLE_SHARE,
    UNMEASURED_S_PER_BYTE,
    WINDOW_S,
    WORKING_BYTES,
    WORKING_SHARE,
    ProbeBudget,
    Use,
)
from bs_coordinator.links.packet_train import dispersion_s

NODES = ("a", "b", "c")
ROUNDING_S = 1e-6
ALL = [(node, way) for node in NODES for way in ("down", "up")]

requests = st.lists(
    st.tuples(
        st.floats(-0.5, 6.0),  # time since the last request; clocks of several callers may differ
        st.sampled_from(NODES),
        st.integers(0, 200_000),  # bytes to the node
        st.integers(0, 200_000),  # and from it
        st.one_of(st.none(), st.floats(1e-9, 1e-4)),  # seconds per byte
        st.sampled_from([0.5, 0.9, 1.0]),
        st.booleans(),  # a request was answered just before
    ),
    max_size=60,
)


@dataclass
class Ledger:
    """What was accepted, added up anew for every question."""

    sent: list[tuple[float, tuple[str, str], float]] = field(default_factory=list)
    first: defaultdict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    def air_s(self, use: Use) -> float:
        if use.s_per_byte is not None:
            return use.n_bytes * use.s_per_byte
        if self.first[use.link] + use.n_bytes <= FIRST_BYTES:
            self.first[use.link] += use.n_bytes
            return 0.0
        return use.n_bytes * UNMEASURED_S_PER_BYTE

    def busiest_s(self, now_s: float, *, shared_air: bool, links: Collection[tuple[str, str]] = ALL) -> float:
        """Air time on the busiest channel, of those with one of `links`, in the window that ends now."""
        sums: defaultdict[object, float] = defaultdict(float)
        for time_s, link, air_s in self.sent:
            if now_s - WINDOW_S + ROUNDING_S <= time_s <= now_s and (shared_air or link in links):
                sums["all" if shared_air else link] += air_s
        return max(sums.values(), default=0.0)


@settings(max_examples=100, deadline=None)
@given(requests, st.booleans())
def test_no_window_exceeds_the_share(
    asked: list[tuple[float, str, int, int, float | None, float, bool]], shared_air: bool
) -> None:
    budget, ledger, now_s, latest_s, worked_s = ProbeBudget(), Ledger(), 100.0, 0.0, -100.0
    for wait_s, node, down, up, s_per_byte, part, worked in asked:
        now_s += wait_s
        latest_s = max(latest_s, now_s)
        if worked:
            budget.worked(latest_s)
            worked_s = latest_s
        uses = [Use((node, "down"), down, s_per_byte), Use((node, "up"), up, s_per_byte)]
        if budget.spend(uses, now_s, shared_air=shared_air, part=part):
            added = [(latest_s, use.link, air_s) for use in uses if (air_s := ledger.air_s(use))]
            ledger.sent += added
            share = WORKING_SHARE if latest_s - worked_s < WINDOW_S - ROUNDING_S else IDLE_SHARE
            most_s = part * share * WINDOW_S + ROUNDING_S
            # What is exempt may be sent while the window is full.
            links = [link for _, link, _ in added]
            assert not added or ledger.busiest_s(latest_s, shared_air=shared_air, links=links) <= most_s
    # Windows that end between two probes contain no more than those that end with one.
    assert all(spent <= FIRST_BYTES for spent in ledger.first.values())
    assert all(
        ledger.busiest_s(time_s, shared_air=shared_air) <= IDLE_SHARE * WINDOW_S + ROUNDING_S
        for time_s, _, _ in ledger.sent
    )


events = st.lists(
    st.tuples(
        st.floats(0.0, 4.0),  # time since the last event
        st.sampled_from(NODES),
        st.booleans(),  # a request rather than a probe
        st.integers(1, 150_000),  # bytes each way
        st.floats(0.0, 0.3),  # how late hosts make it
        st.floats(1e-10, 1e-4),  # seconds per byte as estimated, right or wrong
    ),
    max_size=50,
)


@settings(max_examples=50, deadline=None)
@given(events, st.floats(1e-9, UNMEASURED_S_PER_BYTE), st.booleans())
def test_however_wrong_the_estimates_no_window_exceeds_the_share_of_what_the_link_carries(
    happened: list[tuple[float, str, bool, int, float, float]], true_s_per_byte: float, shared_air: bool
) -> None:
    budget, now_s, worked_s = ProbeBudget(), 100.0, -100.0
    passed = dict.fromkeys(NODES, math.inf)
    probes: list[tuple[float, str, int, bool]] = []
    for wait_s, node, request, n_bytes, late_s, estimate in happened:
        now_s += wait_s
        if request:
            budget.worked(now_s)
            worked_s = now_s
        else:
            uses = [Use((node, way), n_bytes, estimate, passed[node]) for way in ("down", "up")]
            if not budget.spend(uses, now_s, shared_air=shared_air):
                continue
            probes.append((now_s, node, n_bytes, now_s - worked_s < WINDOW_S - ROUNDING_S))
        passed[node] = min(passed[node], true_s_per_byte + late_s / n_bytes)
    for end_s, node, _, working in probes:
        window = [p for p in probes if end_s - WINDOW_S + ROUNDING_S <= p[0] <= end_s]
        if shared_air:
            air_s = 2 * sum(n * true_s_per_byte for _, _, n, _ in window)
        else:
            air_s = sum(n * true_s_per_byte for _, other, n, _ in window if other == node)
        assert air_s <= (WORKING_SHARE if working else IDLE_SHARE) * WINDOW_S + ROUNDING_S
        if working:
            assert sum(n for _, other, n, at_work in window if other == node and at_work) <= WORKING_BYTES


def test_what_fits_is_accepted_and_room_comes_back_after_a_window() -> None:
    budget = ProbeBudget()
    half = [Use(("a", "down"), 10_000, 0.25 / 10_000)]  # a quarter of a second; half a second fits
    spent = [budget.spend(half, at_s, shared_air=False) for at_s in (100.0, 101.0, 102.0, 110.0, 110.1, 110.2)]
    assert spent == [True, True, False, False, True, False]
    assert budget.spend([Use(("b", "down"), 10_000, 0.25 / 10_000)], 110.2, shared_air=False)
    assert not budget.spend([Use(("c", "down"), 10_000, 0.25 / 10_000)], 110.2, shared_air=True)


def test_proofs_are_sent_anyway_and_others_make_room_for_them() -> None:
    budget = ProbeBudget()
    proof = [Use(("a", "up"), 1000, 0.6 / 1000)]
    assert not budget.spend(proof, 100.0, shared_air=False, anyway=True)
    assert not budget.spend([Use(("a", "up"), 1, 1e-6)], 105.0, shared_air=False)
    assert budget.spend([Use(("a", "up"), 1, 1e-6)], 110.1, shared_air=False)


def test_a_train_that_took_longer_counts_for_as_long_as_it_took() -> None:
    def fits(link: tuple[str, str], air_s: float, now_s: float, *, shared_air: bool = False) -> bool:
        return budget.spend([Use(link, 1000, air_s / 1000)], now_s, shared_air=shared_air)

    budget = ProbeBudget()
    assert fits(("a", "down"), 0.1, 100.0)
    budget.took(("a", "down"), 0.45)  # 0.5 fit
    assert not fits(("a", "down"), 0.06, 101.0)
    assert not fits(("b", "up"), 0.06, 101.0, shared_air=True)
    assert fits(("b", "up"), 0.04, 101.0, shared_air=True)
    assert fits(("a", "down"), 0.06, 110.1)


def test_what_was_sent_counts_after_the_estimates_were_dropped() -> None:
    budget = ProbeBudget()
    new, most = [Use(("a", "down"), FIRST_BYTES, None)], [Use(("a", "down"), 1000, 4e-4)]  # 0.4 of at most 0.5 s
    assert budget.spend(new, 100.0, shared_air=False)
    assert budget.spend(most, 100.1, shared_air=False)
    assert not budget.spend(new, 100.2, shared_air=False)
    budget.forget()
    assert budget.spend(new, 100.3, shared_air=False)
    assert not budget.spend(most, 100.4, shared_air=False)


class NoisyFleet:
    """Equal links whose messages are held up by busy hosts, asked layer after layer in simulated time."""

    def __init__(
        self, mbps: float, *, noise_s: float, bunched: bool = False, shared_air: bool = False, seed: int = 0
    ) -> None:
        self.monitor = LinkMonitor()
        self.monitor.shared_air = shared_air  # as experiments do, for each profile
        self.names = [f"n{i}" for i in range(4)]
        self.rng = np.random.default_rng(seed)
        self.now_s, self.mbps, self.noise_s, self.bunched = 100.0, mbps, noise_s, bunched
        self.sent: list[tuple[float, str, int, float]] = []
        """When, node and direction, bytes, and the time on the air."""

    def work(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            samples = []
            for node in self.rng.choice(self.names, 2, replace=False):
                took_s = 6e-3 + 2400 * 8e-6 / self.mbps + self._held_s()
                samples.append(LinkSample(self.now_s + took_s, node, 1200, 1200, took_s, 1e-3, experts=1, rows=1))
            self.now_s = max(sample.time_s for sample in samples) + 0.01
            self.monitor.observe(samples)
            if probe := self.monitor.next_probe(self.names, self.now_s):
                self._send(probe)

    def _held_s(self) -> float:
        return float(self.rng.exponential(self.noise_s)) if self.noise_s and self.rng.random() < 0.4 else 0.0

    def _send(self, probe: Probe) -> None:
        for way, size in (("down", probe.down_bytes), ("up", probe.up_bytes)):
            if size:
                n_bytes = probe.count * size
                self.sent.append((self.now_s, f"{probe.node} {way}", n_bytes, n_bytes * 8e-6 / self.mbps))
        if probe.count == 1:
            took_s = 5e-3 + self._held_s()
            self.monitor.observe([LinkSample(self.now_s + took_s, probe.node, 48, 80, took_s, 1e-3)])
            return
        due_s, arrivals = self.now_s + 5e-3, [(0.0, True)]
        for _ in range(probe.count):
            due_s += 8e-6 * (100 + probe.down_bytes + probe.up_bytes) / self.mbps
            arrivals.append((max(arrivals[-1][0] + 2e-5, due_s + self._held_s()), True))
        if self.bunched and self.rng.random() < 0.9:
            # A host comes to read them when all are there.
            read_s = arrivals[-1][0] + float(self.rng.exponential(0.04))
            arrivals = [(read_s + 2e-5 * i, True) for i in range(len(arrivals))]
        found = dispersion_s(arrivals[1:], probe.lead)
        if found is None:
            self.monitor.answered(probe.node)
            return
        gaps, took_s = found
        down, up = gaps * (48 + probe.down_bytes), gaps * (80 + probe.up_bytes)
        down, up = (down, 0) if probe.down_bytes else (0, up)
        total = probe.count * (48 + probe.down_bytes if probe.down_bytes else 80 + probe.up_bytes)
        last_s = arrivals[-1][0]
        self.monitor.observe(
            [
                LinkSample(
                    last_s, probe.node, down, up, took_s, 0.0,
                    train=True, train_bytes=total, train_s=last_s - self.now_s,
                )
            ]
        )  # fmt: skip

    def busiest_share(self, *, shared_air: bool, since_s: float) -> float:
        """Of any window after `since_s` that ends with a probe, on the busiest channel."""
        shares = []
        for end_s, *_ in self.sent:
            sums: defaultdict[str, float] = defaultdict(float)
            for time_s, link, _, air_s in self.sent:
                if max(since_s, end_s - WINDOW_S) <= time_s <= end_s:
                    sums["all" if shared_air else link] += air_s
            shares.append(max(sums.values(), default=0.0) / WINDOW_S)
        return max(shares)


@pytest.mark.parametrize("bunched", [False, True])
@pytest.mark.parametrize("shared_air", [False, True])
@pytest.mark.parametrize("mbps", [2.0, 50.0])
def test_whatever_the_noise_trains_stay_within_the_budget(mbps: float, shared_air: bool, bunched: bool) -> None:
    fleet = NoisyFleet(mbps, noise_s=8e-3, bunched=bunched, shared_air=shared_air)
    fleet.work(30.0)  # the first trains of links without estimates, which don't count
    began_s = fleet.now_s
    fleet.work(30.0)
    assert 0 < fleet.busiest_share(shared_air=shared_air, since_s=began_s) <= WORKING_SHARE
    assert fleet.monitor.probing().refused > 0 or not shared_air


def test_trains_read_in_a_bunch_neither_speed_the_estimate_up_nor_cause_more_trains() -> None:
    quiet, busy = NoisyFleet(50.0, noise_s=0.0), NoisyFleet(50.0, noise_s=8e-3, bunched=True)
    for fleet in (quiet, busy):
        fleet.work(15.0)
        fleet.sent.clear()
        fleet.work(30.0)
    assert len(busy.sent) < 1.5 * len(quiet.sent)
    for estimate in busy.monitor.estimates(busy.now_s):
        assert max(estimate.link.down_mbps, estimate.link.up_mbps) < 10 * 50


def test_links_of_a_shared_channel_become_known_and_are_probed_again_after_a_long_pause() -> None:
    fleet = NoisyFleet(100.0, noise_s=0.0, shared_air=True)
    for seconds in (30.0, 60.0):
        fleet.sent.clear()
        fleet.work(seconds)
        assert {link for _, link, _, _ in fleet.sent} == {f"{n} {way}" for n in fleet.names for way in ("down", "up")}
        for estimate in fleet.monitor.estimates(fleet.now_s):
            assert estimate.link.down_mbps == pytest.approx(100, rel=0.1)
            assert estimate.link.up_mbps == pytest.approx(100, rel=0.1)
        fleet.now_s += 1200.0  # all that has passed quickly is forgotten


def test_noise_does_not_multiply_the_bytes() -> None:
    """Trains differ on a busy host, and more of them would go on to differ."""
    quiet, busy = NoisyFleet(50.0, noise_s=0.0), NoisyFleet(50.0, noise_s=8e-3)
    sums = []
    for fleet in (quiet, busy):
        fleet.work(5.0)
        fleet.sent.clear()
        fleet.work(30.0)
        sums.append(sum(n_bytes for _, _, n_bytes, _ in fleet.sent))
    assert sums[1] < 6 * sums[0]


def test_a_link_too_slow_for_trains_is_refused_and_grows_uncertain() -> None:
    fleet = NoisyFleet(0.1, noise_s=0.0)
    fleet.work(20.0)
    in_first_s = sum(n_bytes for _, link, n_bytes, _ in fleet.sent if link == "n0 down")
    assert in_first_s <= FIRST_BYTES
    before = next(e for e in fleet.monitor.estimates(fleet.now_s) if e.node == "n0")
    assert before.probing.refused > 0
    after = next(e for e in fleet.monitor.estimates(fleet.now_s + 20) if e.node == "n0")
    assert after.link.down_std_mbps > before.link.down_std_mbps
