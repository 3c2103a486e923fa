"""Damaged inputs to every reader of data from outside: a reader returns a value or raises its own error, in bounds.

Each input is a valid one with one to four byte ranges replaced, or a valid JSON document with one value replaced.
`make fuzz` (`pytest --hypothesis-profile=fuzz`) tries many more inputs than `make test`.
"""

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import testbed
from bs_coordinator.links.estimator import LinkEstimator
from bs_coordinator.nodes.registry import NodeRegistry
from common.errors import KeyFileError, WdmoeError
from testbed.errors import NetworkSpecError, PlanError
from testbed.network.spec import read_spec
from testbed.plan.reading import read_plan
from wire import frame_auth, frames, status, telemetry
from wire.broker_url import parse_broker_url
from wire.errors import BundleError, FrameError
from wire.experts import ExpertId, parse_selector
from wire.frame_auth import TAG_BYTES, ClusterKey, FrameAuthenticator
from wire.frames import (
    ErrorFrame,
    ExpertRows,
    NodeDurations,
    PingFrame,
    PongFrame,
    RequestId,
    ResultFrame,
    Status,
    WorkFrame,
)
from wire.manifest import MANIFEST_NAME, Dims, decode_manifest, load_manifest, verify_file
from wire.status import Holding, NodeStatus, SocketFacts
from wire.tensors import WireDtype

MAX_CPU_S = 10.0
"""Per input, in CPU time of this thread, so that a busy machine changes nothing."""
MAX_BYTES = 128 << 20
"""Per input, at the peak."""
NODE_KEY = bytes(32)
AT_NODE, AT_BASE_STATION = (FrameAuthenticator(NODE_KEY, "boot", at_node=at_node) for at_node in (True, False))
TESTBED = Path(testbed.__file__).parent

# Boundary values of integers and floats, and characters with a meaning in JSON and YAML.
_BOUNDARIES = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 4,
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    b"{",
    b'"',
    b"-",
    b":",
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
T = TypeVar("T")

# All examples of a test share its temporary folder, and each writes over the same file.
_shared_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of the valid inputs after one to four replacements: changed, cut, inserted, repeated or foreign bytes."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 16)))
        elsewhere = [bytes(data[at : at + 64]), *(other[at : at + 16] for other in valid)]
        data[at:end] = draw(st.binary(max_size=16) | st.sampled_from(_BOUNDARIES) | st.sampled_from(elsewhere))
    return bytes(data)


@st.composite
def changed_documents(draw: st.DrawFn, valid: bytes) -> bytes:
    """A JSON document with one of its values, at any depth, replaced or taken out."""
    document = msgspec.json.decode(valid)
    paths = list(_paths(document))
    *path, last = draw(st.sampled_from(paths))
    inner = document
    for key in path:
        inner = inner[key]
    if draw(st.booleans()):
        inner[last] = draw(_JSON)
    else:
        del inner[last]
    return msgspec.json.encode(document)


def _paths(document: Any) -> Iterator[tuple[Any, ...]]:
    keys = range(len(document)) if isinstance(document, list) else document if isinstance(document, dict) else ()
    for key in keys:
        yield (key,)
        yield from ((key, *path) for path in _paths(document[key]))


def read(reader: Callable[[], T], *refusals: type[Exception]) -> T | None:
    """What `reader` returns, or None if it raises one of `refusals`; anything else fails the test."""
    tracemalloc.start()
    began_s = time.thread_time()
    try:
        return reader()
    except refusals:
        return None
    finally:
        cpu_s = time.thread_time() - began_s
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert cpu_s < MAX_CPU_S
        assert peak_bytes < MAX_BYTES


def _valid_frames() -> list[frames.Frame]:
    """Every kind, those with a tensor in every dtype."""
    rng = np.random.default_rng(0)
    id, durations = RequestId(1, 2, 3), NodeDurations(1, 2, 3, 4)
    valid: list[frames.Frame] = [
        ErrorFrame(id, 1, Status.NOT_FINITE, "why"), PingFrame(id, b"x" * 40, 50), PongFrame(id, b"y" * 40, durations)
    ]  # fmt: skip
    for dtype in WireDtype:
        hidden = rng.standard_normal((5, 24)).astype(np.float32)
        slices = [ExpertRows(e, np.array([e, 4], np.uint32), rng.random(2, np.float32)) for e in (0, 3)]
        valid.append(WorkFrame(id=id, layer=1, deadline_ms=100, experts=slices, hidden=hidden, dtype=dtype))
        valid.append(ResultFrame(id, 1, hidden, dtype, durations))
    return valid


PLAIN = [frames.encode(frame) for frame in _valid_frames()]
TAGGED = [frames.encode(frame, authenticator=AT_BASE_STATION) for frame in _valid_frames()]


def with_crc(data: bytes) -> bytes:
    """The same frame with a checksum that is right, so that what lies behind it is reached."""
    crc_at = frames.HEADER_BYTES - 4
    if len(data) < frames.HEADER_BYTES:
        return data
    crc = zlib.crc32(data[frames.HEADER_BYTES :], zlib.crc32(data[:crc_at]))
    return data[:crc_at] + struct.pack("<I", crc) + data[frames.HEADER_BYTES :]


def with_tag(data: bytes) -> bytes:
    """A tagged frame from a key holder who sends nonsense: checksum and tag are right."""
    frame = with_crc(data[:-TAG_BYTES])
    return frame + AT_BASE_STATION.tag([frame])


def check_frame(data: bytes, authenticator: FrameAuthenticator | None) -> None:
    frame = read(lambda: frames.decode(data, authenticator=authenticator), FrameError)
    if frame is not None:
        again = frames.decode(frames.encode(frame))
        assert type(again) is type(frame)
        if not isinstance(frame, WorkFrame | ResultFrame):
            assert again == frame
        elif frame.dtype is not WireDtype.INT8:  # whose scales may differ in their last bit
            assert frames.encode(again) == frames.encode(frame)


@given(damaged(PLAIN), st.booleans())
def test_frames_without_tags(data: bytes, repair: bool) -> None:
    check_frame(with_crc(data) if repair else data, None)


@given(damaged(TAGGED), st.booleans())
def test_frames_with_tags(data: bytes, repair: bool) -> None:
    check_frame(with_tag(data) if repair else data, AT_NODE)


def test_valid_inputs_are_read() -> None:
    """If a repaired or unchanged frame were refused, the tests above would never get past the first check."""
    for plain, tagged in zip(PLAIN, TAGGED, strict=True):
        assert with_crc(plain) == plain
        frames.decode(plain)
        frames.decode(with_tag(tagged), authenticator=AT_NODE)
    status.decode_status(STATUS, "a")
    telemetry.decode_telemetry(TELEMETRY, "a")


DIMS = Dims(hidden=64, intermediate=128, layers=2, experts=8, top_k=2, vocab=256, max_positions=512)
STATUS = status.encode_status(
    NodeStatus(
        schema=status.SCHEMA, node="a", state="online", boot_id="b", since_unix_ms=1,
        holding=Holding(experts="L*:E3", model_sha256="0" * 64, dims=DIMS, quantisation="int4", resident_bytes=1 << 20),
        uplink=SocketFacts(
            endpoint="10.0.0.2:4711", min_rtt_us=2100, delivery_bytes_per_s=5_000_000, app_limited=True
        ),
    )
)  # fmt: skip


@given(damaged([STATUS]) | changed_documents(STATUS))
@example(b'{"schema":1,"node":"\xff"}')
def test_statuses_of_nodes_and_what_a_base_station_does_with_them(data: bytes) -> None:
    def take() -> NodeStatus:
        document = status.decode_status(data, "a")
        if document.holding is not None:
            NodeRegistry(document.holding.dims, document.holding.model_sha256).apply(document)
        if document.uplink is not None:
            LinkEstimator().anchor(document.uplink, towards_node=False, time_s=0.0)
        return document

    document = read(take, FrameError)
    if document is not None:
        assert status.decode_status(status.encode_status(document), "a") == document


TELEMETRY = msgspec.json.encode(
    {
        "schema": telemetry.SCHEMA, "node": "a", "boot_id": "b", "sequence": 2, "unix_ns": 3, "sampling_ms": 0.5,
        "wifi": {"interface": "wlan0", "connected": True, "rssi_dbm": -61, "up_phy_mbps": 433.3},
        "thermal": {"soc_celsius": 51.2, "sensors_celsius": {"cpu": 51.2}, "throttled_bits": 0},
        "power": {"board_watts": 4.5, "rails": {"EXT5V": {"volts": 5.1}}},
    }
)  # fmt: skip


@given(damaged([TELEMETRY]) | changed_documents(TELEMETRY))
def test_telemetry(data: bytes) -> None:
    document = read(lambda: telemetry.decode_telemetry(data, "a"), FrameError)
    if document is not None:
        assert telemetry.decode_telemetry(msgspec.json.encode(document), "a") == document


@given(st.data())
def test_manifests(tiny_bundle: Callable[..., Path], data: st.DataObject) -> None:
    bundle = tiny_bundle("int4")
    valid = (bundle / MANIFEST_NAME).read_bytes()
    raw = data.draw(damaged([valid]) | changed_documents(valid))
    manifest = read(lambda: decode_manifest(raw, bundle), BundleError)
    if manifest is not None:
        assert decode_manifest(msgspec.json.encode(manifest), bundle) == manifest


@_shared_files
@given(st.data())
def test_expert_files_are_refused_before_onnxruntime_sees_them(
    tiny_bundle: Callable[..., Path], tmp_path: Path, data: st.DataObject
) -> None:
    bundle = tiny_bundle("int4")
    entry = load_manifest(bundle).entries([ExpertId(0, 0)])[0].files[0]
    valid = (bundle / entry.path).read_bytes()
    path = tmp_path / entry.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(changed := data.draw(damaged([valid])))

    def verified() -> bool:
        verify_file(tmp_path, entry)
        return True

    assert bool(read(verified, BundleError)) == (changed == valid)


class FileReader(NamedTuple):
    """A reader of files that users write, with a valid one."""

    read: Callable[[Path], object]
    valid: Path
    refusal: type[Exception]


FILES = {
    "plan": FileReader(read_plan, TESTBED / "experiment/plans/policies.yaml", PlanError),
    "network": FileReader(read_spec, TESTBED / "network/specs/wifi.yaml", NetworkSpecError),
}


@pytest.mark.parametrize("name", FILES)
@_shared_files
@given(st.data())
def test_files_that_users_write(name: str, tmp_path: Path, data: st.DataObject) -> None:
    reader = FILES[name]
    raw = reader.valid.read_bytes()
    path = tmp_path / f"{name}.yaml"
    as_json = msgspec.json.encode(msgspec.yaml.decode(raw))  # which is YAML too
    path.write_bytes(data.draw(damaged([raw]) | changed_documents(as_json)))
    document = read(lambda: reader.read(path), reader.refusal)
    if name == "network" and document is not None:
        path.write_bytes(msgspec.yaml.encode(document))
        assert reader.read(path) == document


@_shared_files
@given(damaged([frame_auth.cluster_key_line(KEY := ClusterKey("c", NODE_KEY)), frame_auth.node_key_line(KEY, "a")]))
def test_key_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "frame.key"
    path.touch(mode=0o600)
    path.write_bytes(data)
    read(lambda: frame_auth.read_cluster_key(path, "c"), KeyFileError)
    read(lambda: frame_auth.read_node_key(path, "c", "a"), KeyFileError)


@given(damaged([b"mqtt://user@127.0.0.1:1883", b"mqtts://[::1]:8883", b"mqtts://broker.local"]))
def test_broker_urls(data: bytes) -> None:
    read(lambda: parse_broker_url(data.decode("utf-8", "replace")), ValueError, WdmoeError)


@given(damaged([b"L*:E3", b"L0-1:E0,2-5 L1:E7"]))
def test_expert_selectors(data: bytes) -> None:
    read(lambda: parse_selector(data.decode("utf-8", "replace"), layers=2, experts=8), ValueError)
