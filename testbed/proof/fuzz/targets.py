"""What reads things from outside, and what it may answer to something broken."""

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bs_coordinator.links.estimator import LinkEstimator
from bs_coordinator.nodes.registry import NodeRegistry
from common.errors import WdmoeError
from testbed.errors import NetworkSpecError, PlanError
from testbed.experiment.plan import read_plan
from testbed.network.spec import read_spec
from wire import frames, status
from wire.broker_url import parse_broker_url
from wire.errors import BundleError, FrameError
from wire.experts import ExpertId
from wire.frame_auth import FrameAuthenticator
from wire.frames import (
    ErrorFrame,
    ExpertSlice,
    NodeDurations,
    PingFrame,
    PongFrame,
    RequestId,
    ResultFrame,
    Status,
    WorkFrame,
)
from wire.manifest import MANIFEST_NAME, load_manifest, verify_file
from wire.tensors import WireDtype

_FRAME_CRC = slice(frames.HEADER_BYTES - 4, frames.HEADER_BYTES)


class Target(NamedTuple):
    """A reader.

    Attributes:
        seeds: good inputs.
        read: raises one of `refusals` for a bad one.
        repair: makes a checksum right again, so that what lies behind it is reached; for every second input.
    """

    seeds: list[bytes]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    repair: Callable[[bytes], bytes] | None = None


def frame_target(
    authenticator: FrameAuthenticator | None = None, *, other_end: FrameAuthenticator | None = None
) -> Target:
    """Frames of every kind and dtype, as the base station and nodes decode them.

    Args:
        authenticator: of the reader; None for frames without tags.
        other_end: makes the seeds.
    """
    seeds = [frames.encode(frame, authenticator=other_end) for frame in _frames()]
    return Target(
        seeds,
        lambda data: frames.decode(data, authenticator=authenticator),
        (FrameError,),
        None if authenticator else _with_crc,
    )


def status_target(good: bytes) -> Target:
    """Retained statuses of nodes, and what a base station does with them."""

    def take(data: bytes) -> None:
        document = status.decode_status(data, "a")
        if document.holding is not None:
            NodeRegistry(document.holding.dims, document.holding.model_sha256).apply(document)
        if document.uplink is not None:
            LinkEstimator().anchor(document.uplink, towards_node=False, time_s=0.0)

    return Target([good], take, (FrameError,))


def url_target() -> Target:
    """Brokers' addresses."""
    seeds = [b"mqtt://user@127.0.0.1:1883", b"mqtts://[::1]:8883", b"mqtts://broker.local"]
    return Target(seeds, lambda data: parse_broker_url(data.decode("utf-8", "replace")), (ValueError, WdmoeError))


def manifest_target(bundle: Path, folder: Path) -> Target:
    """A bundle's manifest."""
    return _file_target(
        [(bundle / MANIFEST_NAME).read_bytes()], folder / MANIFEST_NAME, lambda p: load_manifest(p.parent), BundleError
    )


def expert_target(bundle: Path, folder: Path) -> Target:
    """An expert's ONNX file, which is never given to onnxruntime unless it is the one in the manifest."""
    file = load_manifest(bundle).entries([ExpertId(0, 0)])[0].files[0]
    path = folder / file.path

    def read(data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        verify_file(folder, file)

    return Target([(bundle / file.path).read_bytes()[: 1 << 16]], read, (BundleError,))


def plan_target(plan: bytes, folder: Path) -> Target:
    """An experiment's plan."""
    return _file_target([plan], folder / "plan.yaml", read_plan, PlanError)


def network_target(spec: bytes, folder: Path) -> Target:
    """An emulated network's description."""
    return _file_target([spec], folder / "network.yaml", read_spec, NetworkSpecError)


def _file_target(
    seeds: list[bytes], path: Path, read_path: Callable[[Path], object], refusal: type[Exception]
) -> Target:
    def read(data: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read_path(path)

    return Target(seeds, read, (refusal,))


def _frames() -> Iterator[frames.Frame]:
    rng = np.random.default_rng(0)
    some = random.Random(0)  # noqa: S311 - to be reproduced
    id, durations = RequestId(1, 2, 3), NodeDurations(1, 2, 3, 4)
    for dtype in WireDtype:
        hidden = rng.standard_normal((5, 24)).astype(np.float32)
        slices = [
            ExpertSlice(e, np.array(some.sample(range(5), 2), np.uint32), rng.random(2, np.float32)) for e in (0, 3)
        ]
        yield WorkFrame(id=id, layer=1, deadline_ms=100, experts=slices, hidden=hidden, dtype=dtype)
        yield ResultFrame(id, 1, hidden, dtype, durations)
    yield ErrorFrame(id, 1, Status.NOT_FINITE, "why")
    yield PingFrame(id, b"x" * 40, 50)
    yield PongFrame(id, b"y" * 40, durations)


def _with_crc(data: bytes) -> bytes:
    if len(data) < frames.HEADER_BYTES:
        return data
    crc = zlib.crc32(data[_FRAME_CRC.stop :], zlib.crc32(data[: _FRAME_CRC.start]))
    return data[: _FRAME_CRC.start] + struct.pack("<I", crc) + data[_FRAME_CRC.stop :]
