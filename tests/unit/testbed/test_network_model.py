"""The link model: what a frame meets on the air, against arithmetic done here."""

import itertools
import math
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.network.model import MIN_QUEUE_FRAMES, AirModel, Direction
from testbed.network.spec import LinkSpec


class Offer(NamedTuple):
    at: float
    node: int
    direction: Direction
    bytes: int


class Delivery(NamedTuple):
    at: float
    node: int
    direction: Direction
    number: int
    bytes: int


NODES = 3
OFFERS = st.lists(
    st.tuples(st.floats(0, 0.003), st.integers(0, NODES - 1), st.sampled_from(list(Direction)), st.integers(60, 1514)),
    min_size=1,
    max_size=60,
).map(lambda steps: [Offer(sum(s[0] for s in steps[: i + 1]), *steps[i][1:]) for i in range(len(steps))])
LINKS = st.lists(
    st.builds(
        lambda down, up, delay, share, loss: LinkSpec(
            down_mbps=down, up_mbps=up, delay_ms=delay, jitter_ms=delay * share, loss_percent=loss
        ),
        st.floats(1, 100), st.floats(1, 100), st.floats(0, 8), st.floats(0, 1), st.sampled_from([0.0, 30.0]),
    ),
    min_size=NODES,
    max_size=NODES,
)  # fmt: skip


def _air_s(link: LinkSpec, direction: Direction, frame_bytes: int) -> float:
    """1448 payload bytes of a 1500-byte packet at the link's rate; other sizes in proportion."""
    mbps = link.down_mbps if direction is Direction.DOWN else link.up_mbps
    return (frame_bytes - 14) / 1500 * 1448 * 8 / (mbps * 1e6)


def _model(links: list[LinkSpec], *, shared_air: bool, queue_s: float = 100.0) -> AirModel:
    model = AirModel(len(links), queue_s=queue_s)
    model.configure(0.0, links, shared_air=shared_air)
    return model


def _play(model: AirModel, offers: list[Offer]) -> list[Delivery]:
    """Offer everything at its time, waking the model exactly when it asks for it."""
    deliveries = []

    def run(until: float) -> None:
        while (at := model.wake_at()) <= until:
            for node, direction, frame in model.due(at):
                number = int.from_bytes(frame[14:18], "little")
                deliveries.append(Delivery(at, node, direction, number, len(frame)))

    for number, offer in enumerate(offers):
        run(offer.at)
        frame = bytes(14) + number.to_bytes(4, "little") + bytes(offer.bytes - 18)
        model.offer(offer.at, offer.node, offer.direction, frame)
    run(1e9)
    return deliveries


@given(OFFERS, LINKS, st.booleans())
def test_order_is_kept_and_frames_are_delivered_or_counted(
    offers: list[Offer], links: list[LinkSpec], shared_air: bool
) -> None:
    model = _model(links, shared_air=shared_air)
    deliveries = _play(model, offers)
    for node in range(NODES):
        for direction in Direction:
            numbers = [d.number for d in deliveries if (d.node, d.direction) == (node, direction)]
            assert numbers == sorted(numbers)
            assert len(numbers) == len(set(numbers))
            counted = model.counters()[direction.name.lower()][node]
            offered = [o for o in offers if (o.node, o.direction) == (node, direction)]
            assert counted["sent_frames"] == len(numbers)
            assert len(offered) == len(numbers) + counted["lost_frames"] + counted["dropped_frames"]
            assert counted["waiting_frames"] == counted["waiting_ms"] == counted["dropped_frames"] == 0
    for d in deliveries:
        link, offer = links[d.node], offers[d.number]
        earliest = offer.at + _air_s(link, d.direction, d.bytes) + (link.delay_ms - link.jitter_ms) / 1e3
        assert d.at >= earliest - 1e-9
        assert d.bytes == offer.bytes


@given(OFFERS, LINKS)
def test_dedicated_links_follow_lindley(offers: list[Offer], links: list[LinkSpec]) -> None:
    """Each direction is a single server of its own: a frame starts when it is there and the one before is through."""
    steady = [LinkSpec(down_mbps=link.down_mbps, up_mbps=link.up_mbps, delay_ms=link.delay_ms) for link in links]
    got = {d.number: d.at for d in _play(_model(steady, shared_air=False), offers)}
    free_at: dict[tuple[int, Direction], float] = {}
    for number, offer in enumerate(offers):
        key = offer.node, offer.direction
        link = steady[offer.node]
        free_at[key] = max(offer.at, free_at.get(key, 0.0)) + _air_s(link, offer.direction, offer.bytes)
        assert got[number] == pytest.approx(free_at[key] + link.delay_ms / 1e3, abs=1e-9)


@given(OFFERS, LINKS)
def test_shared_air_carries_one_frame_at_a_time_and_is_never_idle_while_one_waits(
    offers: list[Offer], links: list[LinkSpec]
) -> None:
    steady = [LinkSpec(down_mbps=link.down_mbps, up_mbps=link.up_mbps, delay_ms=0) for link in links]
    deliveries = _play(_model(steady, shared_air=True), offers)
    assert len(deliveries) == len(offers)
    ends = sorted((d.at, _air_s(steady[d.node], d.direction, d.bytes)) for d in deliveries)
    for (before, _), (end, air_s) in itertools.pairwise(ends):
        assert end - air_s >= before - 1e-9
    # A single server that never idles finishes at the same time in whatever order it serves.
    free_at = 0.0
    for offer in offers:
        free_at = max(offer.at, free_at) + _air_s(steady[offer.node], offer.direction, offer.bytes)
    assert ends[-1][0] == pytest.approx(free_at, abs=1e-9)


@given(OFFERS, LINKS, st.integers(1, 7))
def test_rate_is_never_exceeded_by_a_relay_that_wakes_late(
    offers: list[Offer], links: list[LinkSpec], wakes: int
) -> None:
    """However rarely the model is asked, it has never delivered more than the rate allows until then."""
    steady = [LinkSpec(down_mbps=link.down_mbps, up_mbps=link.up_mbps, delay_ms=0) for link in links]
    model = _model(steady, shared_air=False)
    air_s = dict.fromkeys(((n, d) for n in range(NODES) for d in Direction), 0.0)
    began: dict[tuple[int, Direction], float] = {}
    for i, offer in enumerate(offers):
        model.offer(offer.at, offer.node, offer.direction, bytes(offer.bytes))
        began.setdefault((offer.node, offer.direction), offer.at)
        if i % wakes == 0:
            for node, direction, frame in model.due(offer.at):
                air_s[node, direction] += _air_s(steady[node], direction, len(frame))
            for key, first in began.items():
                assert air_s[key] <= offer.at - first + 1e-9


def test_stations_take_turns_on_shared_air() -> None:
    """The base station's two queues share its turn, so that every node's up-link gets as much as both together."""
    link = LinkSpec(down_mbps=10, up_mbps=10, delay_ms=0)
    model = _model([link, link], shared_air=True)
    for _ in range(90):
        for node, direction in ((0, Direction.DOWN), (1, Direction.DOWN), (0, Direction.UP)):
            model.offer(0.0, node, direction, bytes(1014))
    first = [(node, direction) for node, direction, _ in model.due(60 * _air_s(link, Direction.UP, 1014))]
    counts = {key: first.count(key) for key in set(first)}
    assert counts[0, Direction.UP] == pytest.approx(30, abs=1)
    assert counts[0, Direction.DOWN] == pytest.approx(15, abs=1)
    assert counts[1, Direction.DOWN] == pytest.approx(15, abs=1)


def test_a_slow_node_takes_the_air_of_a_fast_one() -> None:
    """Air times add up: a frame at 5 Mbit/s holds up one at 50 for its whole time."""
    links = [LinkSpec(down_mbps=5, up_mbps=5, delay_ms=0), LinkSpec(down_mbps=50, up_mbps=50, delay_ms=0)]
    for shared, expected in ((True, 1.1), (False, 0.1)):
        model = _model(links, shared_air=shared)
        model.offer(0.0, 0, Direction.UP, bytes(1514))
        model.offer(0.0, 1, Direction.UP, bytes(1514))
        done = {d.node: d.at for d in _play(model, [])}
        assert done[1] == pytest.approx(expected * _air_s(links[0], Direction.UP, 1514))


def test_a_full_queue_drops_the_newest() -> None:
    link = LinkSpec(down_mbps=8, up_mbps=8, delay_ms=0)
    model = _model([link], shared_air=False, queue_s=0.1)
    taken = [model.offer(0.0, 0, Direction.DOWN, bytes(1014)) for _ in range(300)]
    # One is on the air; what waits is the queue.
    kept = 1 + int(0.1 / _air_s(link, Direction.DOWN, 1014))
    assert taken == [True] * kept + [False] * (300 - kept)
    slow = _model([LinkSpec(down_mbps=0.1, delay_ms=0)], shared_air=False, queue_s=0.1)
    assert sum(slow.offer(0.0, 0, Direction.DOWN, bytes(1014)) for _ in range(50)) == 1 + MIN_QUEUE_FRAMES


def test_loss_and_jitter_are_as_configured() -> None:
    link = LinkSpec(down_mbps=1000, up_mbps=1000, delay_ms=3, jitter_ms=2, loss_percent=5)
    model = _model([link], shared_air=False)
    offers = [Offer(i * 0.01, 0, Direction.DOWN, 60) for i in range(20_000)]
    deliveries = _play(model, offers)
    lost = 1 - len(deliveries) / len(offers)
    assert lost == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / len(offers)))
    delays_ms = sorted((d.at - offers[d.number].at) * 1e3 for d in deliveries)
    assert delays_ms[0] == pytest.approx(1.0, abs=0.01)
    assert delays_ms[-1] == pytest.approx(5.0, abs=0.01)
    # Evenly spread: mean and quartile of [1, 5].
    assert sum(delays_ms) / len(delays_ms) == pytest.approx(3.0, abs=0.05)
    assert delays_ms[len(delays_ms) // 4] == pytest.approx(2.0, abs=0.05)


@given(OFFERS, LINKS, st.booleans(), st.floats(0, 0.1))
def test_a_change_of_links_loses_and_duplicates_nothing(
    offers: list[Offer], links: list[LinkSpec], shared_air: bool, at: float
) -> None:
    calm = [LinkSpec(down_mbps=link.down_mbps, up_mbps=link.up_mbps, delay_ms=link.delay_ms) for link in links]
    model = _model(calm, shared_air=shared_air)
    early = [o for o in offers if o.at <= at]
    first: list[bytes] = []
    for number, offer in enumerate(early):
        model.offer(offer.at, offer.node, offer.direction, bytes(14) + number.to_bytes(4, "little") + bytes(50))
    first += [frame for _, _, frame in model.due(at)]
    model.configure(at, calm[::-1], shared_air=not shared_air)
    rest = [(node, direction, frame) for node, direction, frame in model.due(1e9)]
    numbers = [int.from_bytes(f[14:18], "little") for f in (*first, *(frame for _, _, frame in rest))]
    assert sorted(numbers) == list(range(len(early)))
    for node in range(NODES):
        for direction in Direction:
            of_queue = [int.from_bytes(f[14:18], "little") for n, d, f in rest if (n, d) == (node, direction)]
            assert of_queue == sorted(of_queue)
