"""MQTT packets: what a stream of bytes holds comes out however it is cut, and nothing else gets in.

Our packets are read by brokers in other tests; here a broker's packets, written from the standard's tables, are read.
"""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire import mqtt_packets as packets
from wire.mqtt_packets import ConnAck, Packet, PingResp, PubAck, Publish, Reader, SubAck

ids = st.integers(1, 0xFFFF)
messages = st.builds(
    Publish,
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    st.binary(max_size=300) | st.integers(70_000, 200_000).map(bytes),
    st.booleans(),
    st.just(0) | ids,
)
others = st.one_of(
    st.builds(ConnAck, st.integers(0, 5)),
    st.builds(PubAck, ids),
    st.builds(SubAck, ids, st.booleans()),
    st.just(PingResp()),
)


def _as_a_broker_writes(packet: Packet) -> bytes:
    match packet:
        case Publish(topic, payload, retained, packet_id):
            head = packets.publish_head(topic.encode(), len(payload), retain=retained, packet_id=packet_id)
            return head + payload
        case ConnAck(code):
            return bytes([0x20, 2, 0, code])
        case PubAck(packet_id):
            return b"\x40\x02" + struct.pack(">H", packet_id)
        case SubAck(packet_id, granted):
            return b"\x90\x03" + struct.pack(">H", packet_id) + (b"\x01" if granted else b"\x80")
        case PingResp():
            return b"\xd0\x00"


def _read(reader: Reader, stream: bytes, cuts: list[int]) -> list[Packet]:
    found = []
    start = 0
    for cut in [*sorted(cuts), len(stream)]:
        while start < cut:
            space = reader.space()
            count = min(len(space), cut - start)
            assert count > 0
            space[:count] = stream[start : start + count]
            found += list(reader.received(count))
            start += count
    return found


@given(st.lists(messages | others, min_size=1, max_size=6), st.data())
def test_packets_come_out_however_the_stream_is_cut(sent: list[Packet], data: st.DataObject) -> None:
    stream = b"".join(map(_as_a_broker_writes, sent))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    assert _read(Reader(), stream, cuts) == sent


@pytest.mark.parametrize(
    "stream",
    [
        b"\x30\xff\xff\xff\xff\x01",  # a length of more than four bytes
        b"\x30\xff\xff\xff\x7f",  # 256 MiB
        b"\x30\x03\x00\x09a",  # the topic ends behind the packet
        b"\x30\x01\x00",
        b"\x32\x03\x00\x01a",  # QoS 1 without its packet id
        b"\x34\x05\x00\x01a\x00\x01",  # QoS 2, which we never ask for
        b"\x20\x03\x00\x00\x00",
        b"\xd0\x01\x00",
        b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(80),
    ],
)
def test_what_is_no_packet_is_refused(stream: bytes) -> None:
    with pytest.raises(ValueError, match=r"packet|message"):
        _read(Reader(), stream, [])


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(stream: bytes) -> None:
    reader = Reader()
    try:
        _read(reader, stream, [])
    except ValueError:
        return
    assert len(reader.space()) <= packets.MAX_PACKET_BYTES


def test_a_large_message_is_not_made_room_for_before_its_length_is_checked() -> None:
    reader = Reader()
    before = len(reader.space())
    with pytest.raises(ValueError, match="exceeds"):
        list(_read(reader, b"\x30" + bytes([0xFF, 0xFF, 0xFF, 0x7F]), []))
    assert len(reader.space()) <= before
