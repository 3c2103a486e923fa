"""The status document of a node: retained JSON, and in its shortest form the node's last will."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from wire.documents import Count, decode_document
from wire.errors import FrameError
from wire.experts import ExpertId, parse_selector
from wire.manifest import Dims

SCHEMA = 1
MAX_STATUS_BYTES = 64 << 10


class Holding(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node serves.

    Attributes:
        experts: selector (`wire.experts`) of the experts it answers for.
        model_sha256: `Manifest.model_sha256` of its bundle; the base station's must be equal.
        quantisation: for people, such as `int4 b32`.
        resident_bytes: RAM that the experts take.
    """

    experts: str
    model_sha256: str
    dims: Dims
    quantisation: str
    resident_bytes: Count


class Residency(Struct, frozen=True, kw_only=True):
    """Which of its experts a node that can't keep all of them has in memory, since its start.

    Attributes:
        loaded: selector of the experts in memory.
        most_loaded: how many there is room for.
        loads: experts that requests had to wait for.
        load_ms: mean of those waits.
        evictions: experts that made room.
    """

    loaded: str
    most_loaded: Count
    loads: Count
    load_ms: Annotated[float, Meta(ge=0)]
    evictions: Count


class Machine(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The device behind a node, for logs.

    Attributes:
        disk_free_bytes: where the node's bundle lies.
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
    """What the node takes its device for, and what computes.

    Attributes:
        profile: see `wire.device_profiles`; because: what it was recognised by.
        provider: see there; provider_reason: why not what was asked for, empty if it is.
        batch_invariant: a hidden state's output is the same to the last bit whatever is beside it, as tried at the
            start; None where it was not.
    """

    profile: str
    because: str
    provider: str
    provider_reason: str = ""
    batch_invariant: bool | None = None


class SocketFacts(Struct, frozen=True, kw_only=True):
    """The kernel's account of one TCP connection, of the direction in which its owner sends.

    Attributes:
        endpoint: the owner's own address and port, by which the other end knows the connection.
        min_rtt_us: smallest round trip; 0 or 2³²−1 if none was measured yet.
        delivery_bytes_per_s: rate of what was acknowledged most recently.
        app_limited: the owner had nothing more to send, so the link may be faster than that.
    """

    endpoint: str
    min_rtt_us: Count
    delivery_bytes_per_s: Count
    app_limited: bool


class NodeStatus(Struct, frozen=True, kw_only=True):
    """State of one node. Unknown fields are ignored, so that newer nodes can say more.

    Attributes:
        boot_id: random per process, tells two processes with one id apart.
        since_unix_ms: when the process announced itself, by its own clock.
        reason: why it is offline, for people.
        uplink: its connection to the broker, where the kernel tells.
        device: see there.
        residency: of its experts, where it can't keep all of them in memory.
        refused: it wanted an id that another process has, says so once, not retained, and ends; nothing changes for
            that other process.
        rival: of that other process: who was refused last, and when.
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
    refused: bool = False
    rival: str = ""

    @property
    def online(self) -> bool:
        """Whether the node takes work."""
        return self.state == "online"

    def expert_ids(self) -> tuple[ExpertId, ...]:
        """Experts that this node answers for; none when offline."""
        if not self.online or self.holding is None:
            return ()
        dims = self.holding.dims
        return parse_selector(self.holding.experts, layers=dims.layers, experts=dims.experts)


def encode_status(status: NodeStatus) -> bytes:
    """JSON bytes of a status."""
    return msgspec.json.encode(status)


_decoder = msgspec.json.Decoder(NodeStatus)


def decode_status(payload: bytes, node: str) -> NodeStatus:
    """The status in `payload`, which arrived on the status topic of `node`.

    Raises:
        FrameError: it is too long, not valid, of another schema, or speaks for another node.
    """
    status = decode_document(payload, node, _decoder, what="status", most_bytes=MAX_STATUS_BYTES, schema=SCHEMA)
    try:
        status.expert_ids()
    except ValueError as error:
        raise FrameError("status", f"status names impossible experts: {error}") from None
    return status
