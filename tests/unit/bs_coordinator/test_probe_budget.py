"""The budget of probes against plain sums over every window, and fleets that would like to send more."""

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
            if now_s - WINDOW_S <= time_s <= now_s and (shared_air or link in links):
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


def test_what_was_sent_counts_after_the_estimates_were_dropped() -> None:
    budget = ProbeBudget()
    first = [Use(("a", "down"), FIRST_BYTES, None)]
    assert budget.spend(first, 100.0, shared_air=False)
    assert not budget.spend(first, 100.1, shared_air=False)
    assert budget.spend([Use(("a", "down"), 1000, 4e-4)], 100.2, shared_air=False)
    budget.forget()
    assert budget.spend(first, 100.3, shared_air=False)
    assert not budget.spend([Use(("a", "down"), 1000, 4e-4)], 100.4, shared_air=False)


class NoisyFleet:
    """Equal links whose messages are held up by busy hosts, asked layer after layer in simulated time."""

    def __init__(self, mbps: float, *, noise_s: float, shared_air: bool = False, seed: int = 0) -> None:
        self.monitor = LinkMonitor()
        self.monitor.shared_air = shared_air  # as experiments do, for each profile
        self.names = [f"n{i}" for i in range(4)]
        self.rng = np.random.default_rng(seed)
        self.now_s, self.mbps, self.noise_s = 100.0, mbps, noise_s
        self.sent: list[tuple[float, str, int, float]] = []
        """When, node and direction, bytes, and the air time by the estimate of that moment."""

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
        link = next(e.link for e in self.monitor.estimates(self.now_s) if e.node == probe.node)
        for way, size, mbps in (("down", probe.down_bytes, link.down_mbps), ("up", probe.up_bytes, link.up_mbps)):
            if size:
                n_bytes = probe.count * size
                self.sent.append((self.now_s, f"{probe.node} {way}", n_bytes, n_bytes * 8e-6 / mbps))
        if probe.count == 1:
            took_s = 5e-3 + self._held_s()
            self.monitor.observe([LinkSample(self.now_s + took_s, probe.node, 48, 80, took_s, 1e-3)])
            return
        due_s, arrivals = self.now_s + 5e-3, [(0.0, True)]
        for _ in range(probe.count):
            due_s += 8e-6 * (100 + probe.down_bytes + probe.up_bytes) / self.mbps
            arrivals.append((max(arrivals[-1][0] + 2e-5, due_s + self._held_s()), True))
        found = dispersion_s(arrivals[1:], probe.lead)
        if found is None:
            self.monitor.answered(probe.node)
            return
        gaps, took_s = found
        down, up = gaps * (48 + probe.down_bytes), gaps * (80 + probe.up_bytes)
        down, up = (down, 0) if probe.down_bytes else (0, up)
        self.monitor.observe([LinkSample(arrivals[-1][0], probe.node, down, up, took_s, 0.0, train=True)])

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


@pytest.mark.parametrize("shared_air", [False, True])
@pytest.mark.parametrize("mbps", [2.0, 50.0])
def test_whatever_the_noise_trains_stay_within_the_budget(mbps: float, shared_air: bool) -> None:
    fleet = NoisyFleet(mbps, noise_s=8e-3, shared_air=shared_air)
    fleet.work(2.0)  # the first trains of links without estimates
    began_s = fleet.now_s
    fleet.work(30.0)
    assert 0 < fleet.busiest_share(shared_air=shared_air, since_s=began_s) <= WORKING_SHARE
    assert fleet.monitor.probing().refused > 0 or not shared_air


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
