"""Frame authentication: keys, tags, and protection against replayed requests.

A tag is HMAC-SHA256 (RFC 2104), cut to 16 bytes, over the whole frame, including session, request and attempt. Each
node and each direction has its own key, so that a tag is valid for one node and one direction only:

    cluster key ──HKDF──▶ node key ──HKDF──▶ key towards the node, key from the node

The base station holds the cluster key, a node only its own node key: a compromised node can't sign for other nodes.
"""

import hashlib
import hmac
from collections import OrderedDict
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
_WINDOW = 4096
_SESSIONS = 256


class FrameAuthenticator:
    """Makes and checks tags at one end of the connection between the base station and a node."""

    def __init__(self, node_key: bytes, *, at_node: bool) -> None:
        """Derive the keys of both directions.

        Args:
            node_key: `KEY_BYTES` bytes.
            at_node: whether this is the node's end.
        """
        down, up = _expand(node_key, b"down"), _expand(node_key, b"up")
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
                "forged", "the tag does not match: the sender has another key, or bytes were changed on the way"
            )


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The key from which the base station derives the keys of all nodes."""

    cluster: str
    secret: bytes = field(repr=False)

    def node_key(self, node: str) -> bytes:
        """The key of one node, `KEY_BYTES` bytes."""
        return _expand(self.secret, f"wdmoe/v1/{self.cluster}/{node}".encode())

    def authenticator(self, node: str) -> FrameAuthenticator:
        """The base station's end of the connection to `node`."""
        return _authenticator(self, node)


@lru_cache(maxsize=1024)
def _authenticator(key: ClusterKey, node: str) -> FrameAuthenticator:
    return FrameAuthenticator(key.node_key(node), at_node=False)


class ReplayWindow:
    """Tells new requests from replayed ones, in bounded memory.

    The last `_WINDOW` requests of each of the last `_SESSIONS` sessions are remembered. Since request numbers count up,
    a request with a lower number than one that was forgotten is taken for a replay.
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[int, _Session] = OrderedDict()

    def is_new(self, session: int, request: int, attempt: int) -> bool:
        """Whether this request was not received before; it counts as received from now on."""
        seen = self._sessions.get(session)
        if seen is None:
            seen = self._sessions[session] = _Session()
            if len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        else:
            self._sessions.move_to_end(session)
        return seen.is_new(request, attempt)


class _Session:
    def __init__(self) -> None:
        self._floor = 0
        self._ids: OrderedDict[tuple[int, int], None] = OrderedDict()

    def is_new(self, request: int, attempt: int) -> bool:
        id = (request, attempt)
        if id in self._ids or request < self._floor:
            return False
        self._ids[id] = None
        if len(self._ids) > _WINDOW:
            forgotten, _ = self._ids.popitem(last=False)[0]
            self._floor = max(self._floor, forgotten + 1)
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


def read_node_authenticator(path: Path, cluster: str, node: str) -> FrameAuthenticator:
    """The node's end of its connection, from the node key in a file.

    Raises:
        KeyFileError: the file can't be read, is not a node key, or belongs to another node.
    """
    key = _read(path, _NODE_KIND, "a node needs its own key only")
    if (key.cluster, key.node) != (cluster, node):
        raise KeyFileError(
            f"{path} is the key of '{key.node}' in cluster '{key.cluster}', not of '{node}' in '{cluster}'"
        )
    return FrameAuthenticator(key.secret, at_node=True)


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
