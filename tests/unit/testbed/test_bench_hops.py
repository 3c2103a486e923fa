"""Frames are found in made-up packets however TCP cuts them, and a layer's hops add up to its time."""

import itertools
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.engine.step_records import DispatchRecord, LayerRecord
from testbed.bench.floor import Alone, FloorLink
from testbed.bench.hops import BROKER, COMPUTE, LINK_DOWN, LINK_UP, LOOPBACK, NODE, TRUNK, Passages
from testbed.bench.packets import Frames, Sighting
from wire import frames
from wire.frames import ExpertRows, Frame, NodeDurations, RequestId, ResultFrame, WorkFrame
from wire.tensors import WireDtype
from wire.topics import Topics

TOPICS = Topics("demo")
LINK = FloorLink(rtt_ms=5.0, mbps=100.0)
ALONE = Alone(trunk_ms=12.0, head_ms=9.0, compute_ms=lambda experts: 0.2 * experts)
DURATIONS = NodeDurations(queue_ns=20_000, decode_ns=50_000, compute_ns=400_000, encode_ns=30_000)


def _work(request: int, *, layer: int = 0, tokens: int = 1) -> WorkFrame:
    rows = ExpertRows(3, np.arange(tokens, dtype=np.uint32), np.ones(tokens, np.float32))
    return WorkFrame(RequestId(7, request), layer, 0, [rows], np.ones((tokens, 64), np.float32), WireDtype.FP32)


def _result(request: int, *, layer: int = 0) -> ResultFrame:
    return ResultFrame(RequestId(7, request), layer, np.ones((1, 64), np.float32), WireDtype.FP32, DURATIONS)


def _published(topic: str, payload: bytes) -> bytes:
    """An MQTT PUBLISH of QoS 0."""
    body = struct.pack("!H", len(topic)) + topic.encode() + payload
    length, field = len(body), b""
    while True:
        length, low = divmod(length, 128)
        field += bytes([low | (0x80 if length else 0)])
        if not length:
            return b"\x30" + field + body


def _segment(sequence: int, payload: bytes, *, port: int = 40000) -> bytes:
    """A TCP segment in an IPv4 packet, with TCP's time stamps and the padding of a short Ethernet frame."""
    tcp = struct.pack("!HHIIBBHHH", port, 1883, sequence % (1 << 32), 0, 8 << 4, 0x18, 500, 0, 0) + bytes(12)
    length = 20 + len(tcp) + len(payload)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, length, 0, 0x4000, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    return ip + tcp + payload + bytes(max(0, 46 - length))


def _found(packets: Iterable[tuple[int, bytes]]) -> list[tuple[int, RequestId]]:
    finder = Frames()
    return [(one.at_ns, one.frame.id) for at_ns, packet in packets for one in finder.take("here", at_ns, packet)]


SENT: Sequence[tuple[str, Frame]] = (
    (TOPICS.work("a"), _work(0)),
    (TOPICS.work("b"), _work(1, tokens=80)),
    (TOPICS.results("a"), _result(2)),
)
STREAM = b"".join(_published(topic, frames.encode(frame)) for topic, frame in SENT)
ENDS = np.cumsum([len(_published(topic, frames.encode(frame))) for topic, frame in SENT]).tolist()


@given(st.sets(st.integers(1, len(STREAM) - 1), max_size=12), st.integers(0, 2**32 - 1))
def test_a_frame_passes_with_the_segment_that_completes_it(cuts: set[int], first: int) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    # The time of a segment is the place in the stream where it ends.
    packets = [(end, _segment(first + begin, STREAM[begin:end])) for begin, end in itertools.pairwise(edges)]
    expected = [
        (min(edge for edge in edges if edge >= end), frame.id) for end, (_, frame) in zip(ENDS, SENT, strict=True)
    ]
    assert _found(packets) == expected
    # Segments that are sent again change nothing.
    assert _found([one for packet in packets for one in (packet, packet)]) == expected


def test_after_a_gap_the_next_message_is_found() -> None:
    cut = ENDS[1] - 10
    packets = [(1, _segment(0, STREAM[:cut])), (3, _segment(ENDS[1], STREAM[ENDS[1] :]))]
    assert _found(packets) == [(1, RequestId(7, 0)), (3, RequestId(7, 2))]


def test_connections_are_kept_apart_and_other_packets_ignored() -> None:
    half = ENDS[0] // 2
    udp = bytearray(_segment(0, STREAM))
    udp[9] = 17
    packets = [
        (1, _segment(0, STREAM[:half])),
        (2, _segment(half, STREAM[half:], port=40001)),
        (3, bytes(udp)),
        (4, _segment(0, _published("wdmoe/v1/demo/nodes/a/telemetry", b'{"schema": 1}'), port=40002)),
        (5, _segment(0, b"")[:30]),
        (6, _segment(half, STREAM[half : ENDS[0]])),
    ]
    assert _found(packets) == [(6, RequestId(7, 0))]


@given(st.binary(max_size=200))
def test_any_packet_is_taken(packet: bytes) -> None:
    assert _found([(0, packet), (1, _segment(0, packet)), (2, packet)]) == []


times = st.integers(0, 3_000_000)


@given(st.lists(times, min_size=7, max_size=7), times, times, st.integers(-2_000, 2_000))
def test_hops_add_up_to_the_layer(gaps: list[int], trunk_ns: int, planned_ns: int, later_ns: int) -> None:
    gaps[3] += DURATIONS.total_ns
    sent_ns = 10**18
    at_ns = [sent_ns + sum(gaps[: k + 1]) for k in range(6)]
    down, up = (LOOPBACK, BROKER, NODE), (NODE, BROKER, LOOPBACK)
    passed = [
        *(Sighting(down[k], at_ns[k], TOPICS.work("n"), _work(5, layer=4)) for k in range(3)),
        *(Sighting(up[k], at_ns[3 + k], TOPICS.results("n"), _result(5, layer=4)) for k in range(3)),
        # The same layer of the next token, another layer and another node.
        Sighting(LOOPBACK, sent_ns + 10**9, TOPICS.work("n"), _work(6, layer=4)),
        Sighting(LOOPBACK, sent_ns, TOPICS.work("n"), _work(7, layer=5)),
        Sighting(LOOPBACK, sent_ns, TOPICS.work("other"), _work(8, layer=4)),
    ]  # fmt: skip
    round_trip_ns = sum(gaps) + 10**7
    slowest = DispatchRecord("n", (3,), 1, sent_ns, round_trip_ns, DURATIONS, 1250, 2500, 0, planned_ns)
    other = DispatchRecord("other", (1,), 1, sent_ns + later_ns, round_trip_ns - 1, DURATIONS, 1250, 2500, 0)
    layer = LayerRecord(4, trunk_ns, planned_ns + round_trip_ns + 70_000, (), (other, slowest))
    hops = Passages(passed).hops(layer, LINK, ALONE, layers=30)
    assert hops is not None
    assert sum(hops.ms.values()) == pytest.approx((layer.trunk_ns + layer.dispatch_ns) / 1e6)
    assert hops.ms["base station: writes"] == pytest.approx(gaps[0] / 1e6)
    assert hops.ms["broker, down"] == pytest.approx(gaps[1] / 1e6)
    assert hops.ms["relay and kernels, down"] == pytest.approx(gaps[2] / 1e6 - 2.6)
    assert hops.ms["node: wakes up and reads, writes"] == pytest.approx((gaps[3] - DURATIONS.total_ns) / 1e6)
    assert hops.ms["relay and kernels, up"] == pytest.approx(gaps[4] / 1e6 - 2.7)
    assert hops.ms["broker, up"] == pytest.approx(gaps[5] / 1e6)
    assert hops.ms["base station: wakes up and reads"] == pytest.approx(10 + gaps[6] / 1e6)
    assert hops.ms["base station: decodes and adds up"] == pytest.approx(0.07)
    assert hops.alone_ms == pytest.approx({TRUNK: 0.4, LINK_DOWN: 2.6, COMPUTE: 0.2, LINK_UP: 2.7})


def test_without_all_packets_a_layer_has_no_hops() -> None:
    record = DispatchRecord("n", (3,), 1, 1000, 500, DURATIONS, 1250, 2500, 0)
    layer = LayerRecord(4, 0, 600, (), (record,))
    seen = [Sighting(where, 1100, TOPICS.work("n"), _work(5, layer=4)) for where in (LOOPBACK, BROKER, NODE)]
    answered = [Sighting(where, 1200, TOPICS.results("n"), _result(5, layer=4)) for where in (NODE, BROKER, LOOPBACK)]
    assert Passages([*seen, *answered]).hops(layer, LINK, ALONE, layers=30) is not None
    assert Passages([*seen, *answered[:2]]).hops(layer, LINK, ALONE, layers=30) is None
    assert Passages(answered).hops(layer, LINK, ALONE, layers=30) is None
    # What passed a token later is another request.
    late = [one._replace(at_ns=one.at_ns + 10_000) for one in (*seen, *answered)]
    assert Passages(late).hops(layer, LINK, ALONE, layers=30) is None
    assert Passages([*seen, *answered]).hops(LayerRecord(4, 0, 600, ()), LINK, ALONE, layers=30) is None
