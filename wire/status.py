"""The status document of a node: retained JSON; its shortest form is the node's last will."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from wire.documents import Count, decode_document
from wire.errors import FrameError
from wire.experts import UnitId, check_selector, parse_selector
from wire.manifest import Dims

SCHEMA = 1
MAX_STATUS_BYTES = 64 << 10
FRAME_TAGS = 1
"""Version of the tags of frames: keyed by the node's boot id."""


class Holding(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node serves.

    Attributes:
        experts: selector (`wire.experts`) of the experts, or slices of experts, it answers for.
        model_sha256: `Manifest.model_sha256` of its bundle; the base station's must be equal.
        quantisation: such as `int4 b32`, for people.
        resident_bytes: RAM that the experts take.
    """

    experts: str
    model_sha256: str
    dims: Dims
    quantisation: str
    resident_bytes: Count


class Residency(Struct, frozen=True, kw_only=True):
    """Experts in the memory of a node that can't keep all of them there. Counts are since the node's start.

    Attributes:
        loaded: selector of the experts in memory.
        most_loaded: how many fit into memory.
        loads: experts that were loaded while a request waited.
        load_ms: mean of these waits.
        evictions: experts that were removed to make room.
    """

    loaded: str
    most_loaded: Count
    loads: Count
    load_ms: Annotated[float, Meta(ge=0)]
    evictions: Count


class Work(Struct, frozen=True, kw_only=True):
    """What a node has computed since its start.

    Attributes:
        requests: that it answered.
        rows: hidden states in them.
        rows_per_s: since the status before this one.
    """

    requests: Count
    rows: Count
    rows_per_s: Annotated[float, Meta(ge=0)]


class Machine(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The device behind a node, for logs.

    Attributes:
        disk_free_bytes: free space of the disk that holds the bundle.
    """

    host: str
    pid: Count
    arch: str
    cpus: Count
    threads: Count
    ram_bytes: Count
    available_bytes: Count
    wdmoe: str
    onnxruntime: str
    disk_free_bytes: Count | None = None


class DeviceFacts(Struct, frozen=True, kw_only=True):
    """The kind of the node's device, and what it computes with.

    Attributes:
        profile: name of a profile in `wire.device_profiles`.
        because: what the device was recognised by, for people.
        provider: execution provider of onnxruntime, such as `cpu`.
        provider_reason: why it is not the one that was asked for; empty if it is.
        batch_invariant: a hidden state's output is the same to the last bit alone and in a batch, as tried at the
            start; None if it was not tried.
        real_time: the thread that answers has real-time priority where it computes few tokens; None if that is unknown.
    """

    profile: str
    because: str
    provider: str
    provider_reason: str = ""
    batch_invariant: bool | None = None
    real_time: bool | None = None


class SocketFacts(Struct, frozen=True, kw_only=True):
    """The kernel's statistics of one TCP connection, in the direction in which its owner sends.

    Attributes:
        endpoint: the owner's address and port, by which the other end knows the connection.
        min_rtt_us: smallest round trip; 0 or 2³²−1 if none was measured yet.
        delivery_bytes_per_s: rate at which data was acknowledged most recently.
        app_limited: the owner had nothing more to send then, so the link may be faster.
    """

    endpoint: str
    min_rtt_us: Count
    delivery_bytes_per_s: Count
    app_limited: bool


class NodeStatus(Struct, frozen=True, kw_only=True):
    """State of one node. Unknown fields are ignored, so that newer nodes can add some.

    Attributes:
        boot_id: random per process; tells two processes with the same id apart, and is part of the key of the tags of
            frames to this node (`wire.frame_auth`).
        since_unix_ms: when the process announced itself, by its own clock.
        reason: why it is offline, for people.
        holding: the experts that it serves; None if offline.
        machine: the device behind it.
        uplink: its connection to the broker; None if the kernel has no statistics.
        device: the kind of its device; None in a last will and from old nodes.
        residency: of its experts, if it can't keep all of them in memory.
        work: what it has computed; None in a last will and from old nodes.
        refused: this process wanted an id that another process has. It publishes this once, not retained, and ends;
            nothing changes for the other process.
        rival: host and time of the last process that was refused this id; empty if there was none.
        frame_tags: version of the tags that frames to and from this node carry (`FRAME_TAGS`); 0 if they carry none.
    """

    schema: int
    node: str
    boot_id: str
    state: Literal["online", "offline"]
    since_unix_ms: Count
    reason: str = ""
    holding: Holding | None = None
    machine: Machine | None = None
    uplink: SocketFacts | None = None
    device: DeviceFacts | None = None
    residency: Residency | None = None
    work: Work | None = None
    refused: bool = False
    rival: str = ""
    frame_tags: Count = 0

    @property
    def online(self) -> bool:
        """Whether the node takes work."""
        return self.state == "online"

    def unit_ids(self) -> tuple[UnitId, ...]:
        """Experts, or slices of experts, that this node answers for; none when offline."""
        if not self.online or self.holding is None:
            return ()
        dims = self.holding.dims
        return parse_selector(self.holding.experts, layers=dims.layers, experts=dims.experts, slices=dims.slices)


def encode_status(status: NodeStatus) -> bytes:
    """JSON bytes of a status."""
    return msgspec.json.encode(status)


_decoder = msgspec.json.Decoder(NodeStatus)


def decode_status(payload: bytes, node: str) -> NodeStatus:
    """The status in `payload`, which arrived on the status topic of `node`.

    Raises:
        FrameError: the payload is too long, not valid, of another schema, or about another node.
    """
    status = decode_document(payload, node, _decoder, what="status", most_bytes=MAX_STATUS_BYTES, schema=SCHEMA)
    try:
        if status.online and (holding := status.holding) is not None:
            dims = holding.dims
            check_selector(holding.experts, layers=dims.layers, experts=dims.experts, slices=dims.slices)
    except ValueError as error:
        raise FrameError("status", f"the status names experts that can't exist: {error}") from None
    return status
