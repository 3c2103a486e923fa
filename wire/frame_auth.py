"""Frame authentication: keys, tags, and protection against replayed requests.

A tag is HMAC-SHA256 (RFC 2104), cut to 16 bytes, over the whole frame, including session, request and attempt. Each
node and each direction has its own key, so that a tag is valid for one node and one direction only:

    cluster key ──HKDF──▶ node key ─┬─HKDF──▶ key from the node
                                    └─HKDF──▶ key towards the node ──HKDF, boot id──▶ key of this start of the node

The base station holds the cluster key, a node only its own node key: a compromised node can't sign for other nodes.

The boot id is a random number that a node draws at each start and announces in its status. So requests that were
recorded before a node's restart do not match its new key, and the node need not remember them. The status carries no
tag: a broker that changes the boot id makes the node's requests fail, which it could also do by dropping them, but it
can't make an old request fit the number that the node itself drew.
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from common.errors import KeyFileError
from common.private_files import read_private
from wire.errors import FrameError

TAG_BYTES = 16
KEY_BYTES = 32
_CLUSTER_KIND = "wdmoe-cluster-key-v1"
_NODE_KIND = "wdmoe-node-key-v1"


class FrameAuthenticator:
    """Makes and checks tags at one end of the connection between the base station and a node."""

    def __init__(self, node_key: bytes, boot_id: str, *, at_node: bool) -> None:
        """Derive the keys of both directions.

        Args:
            node_key: `KEY_BYTES` bytes.
            boot_id: the random number of this start of the node, as in its status.
            at_node: whether this is the node's end.
        """
        down, up = _expand(_expand(node_key, b"down"), boot_id.encode()), _expand(node_key, b"up")
        sending, receiving = (up, down) if at_node else (down, up)
        # Keying costs two hash blocks: done once, and the state copied per frame.
        self._sending = hmac.new(sending, digestmod=hashlib.sha256)
        self._receiving = hmac.new(receiving, digestmod=hashlib.sha256)

    def tag(self, parts: Iterable[bytes | memoryview]) -> bytes:
        """The tag, `TAG_BYTES` long, of a frame to be sent, given in parts."""
        mac = self._sending.copy()
        for part in parts:
            mac.update(part)
        return mac.digest()[:TAG_BYTES]

    def check(self, frame: memoryview, tag: memoryview) -> None:
        """Check a received frame's tag, in constant time.

        Raises:
            FrameError: the tag does not match; reason `forged`.
        """
        mac = self._receiving.copy()
        mac.update(frame)
        if not hmac.compare_digest(mac.digest()[:TAG_BYTES], tag):
            raise FrameError(
                "forged",
                "the tag does not match: the sender has another key, the frame was meant for an earlier start of this "
                "node, or bytes were changed on the way",
            )


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The key from which the base station derives the keys of all nodes."""

    cluster: str
    secret: bytes = field(repr=False)

    def node_key(self, node: str) -> bytes:
        """The key of one node, `KEY_BYTES` bytes."""
        return _expand(self.secret, f"wdmoe/v1/{self.cluster}/{node}".encode())

    def authenticator(self, node: str, boot_id: str) -> FrameAuthenticator:
        """The base station's end of the connection to `node`, whose status has this `boot_id`."""
        return _authenticator(self, node, boot_id)


@lru_cache(maxsize=1024)
def _authenticator(key: ClusterKey, node: str, boot_id: str) -> FrameAuthenticator:
    return FrameAuthenticator(key.node_key(node), boot_id, at_node=False)


class ReplayGuard:
    """Tells new requests from replayed ones, for as long as a node runs.

    A session numbers its requests upwards, and MQTT keeps their order, so the last number of each session is all there
    is to remember: about 100 bytes per start of a base station that holds the cluster key.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int]] = {}

    def is_new(self, session: int, request: int, attempt: int) -> bool:
        """Whether this request is later than all others of its session; it counts as received from now on."""
        if (request, attempt) <= self._last.get(session, (-1, 0)):
            return False
        self._last[session] = (request, attempt)
        return True


def read_cluster_key(path: Path, cluster: str) -> ClusterKey:
    """The cluster key in a file.

    Raises:
        KeyFileError: the file can't be read, is not a cluster key, or belongs to another cluster.
    """
    key = _read(path, _CLUSTER_KIND, "the base station needs the cluster key")
    if key.cluster != cluster:
        raise KeyFileError(f"{path} is the key of cluster '{key.cluster}', not of '{cluster}': check --cluster")
    return ClusterKey(cluster, key.secret)


def read_node_key(path: Path, cluster: str, node: str) -> bytes:
    """The node key in a file, `KEY_BYTES` bytes.

    Raises:
        KeyFileError: the file can't be read, is not a node key, or belongs to another node.
    """
    key = _read(path, _NODE_KIND, "a node needs its own key only")
    if (key.cluster, key.node) != (cluster, node):
        raise KeyFileError(
            f"{path} is the key of '{key.node}' in cluster '{key.cluster}', not of '{node}' in '{cluster}'"
        )
    return key.secret


def cluster_key_line(key: ClusterKey) -> bytes:
    """The content of a cluster key's file."""
    return f"{_CLUSTER_KIND} {key.cluster} {key.secret.hex()}\n".encode()


def node_key_line(key: ClusterKey, node: str) -> bytes:
    """The content of a node key's file."""
    return f"{_NODE_KIND} {key.cluster} {node} {key.node_key(node).hex()}\n".encode()


class _KeyFile(NamedTuple):
    """A key file: one line of `kind cluster secret`, or `kind cluster node secret` for a node's key."""

    cluster: str
    node: str
    secret: bytes


def _read(path: Path, kind: str, hint: str) -> _KeyFile:
    words = read_private(path).decode("ascii", errors="replace").split()
    found = words[0] if words else ""
    if found != kind and found in (_CLUSTER_KIND, _NODE_KIND):
        raise KeyFileError(f"{path} is a {found}: {hint}")
    try:
        if found != kind:
            raise ValueError
        _, cluster, *names, secret_hex = words
        (node,) = names if kind == _NODE_KIND else ("", *names)
        secret = bytes.fromhex(secret_hex)
        if len(secret) != KEY_BYTES:
            raise ValueError
    except ValueError:
        raise KeyFileError(f"{path} is not a {kind}: {hint}, made by 'wdmoe-testbed keys'") from None
    return _KeyFile(cluster, node, secret)


def _expand(key: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869) without salt: a single block, so extract and expand are one HMAC each."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")
