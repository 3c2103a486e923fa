"""Frames that only the base station and one node can make: keys, tags, and what was received before.

A tag is HMAC-SHA256 (RFC 2104), cut to 16 bytes, over the whole frame, so over session, request and attempt too. Each
node and each direction has a key of its own, so that no tag is good for another node or for the way back:

    cluster key ──HKDF──▶ node key ──HKDF──▶ key towards the node, key from the node

The base station holds the cluster key, a node its own node key only: one that is taken over can't speak for others.
"""

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from common.errors import KeyFileError
from common.private_files import read_private
from wire.errors import FrameError

TAG_BYTES = 16
KEY_BYTES = 32
_CLUSTER_WORD = "wdmoe-cluster-key-v1"
_NODE_WORD = "wdmoe-node-key-v1"
_WINDOW = 4096
_SESSIONS = 256


class FrameAuthenticator:
    """One end of the way between the base station and a node."""

    def __init__(self, node_key: bytes, *, at_node: bool) -> None:
        """Derive both directions' keys.

        Args:
            at_node: this is the node's end.
        """
        down, up = _expand(node_key, b"down"), _expand(node_key, b"up")
        sending, receiving = (up, down) if at_node else (down, up)
        # A keyed state costs two hash blocks: made once, copied per frame.
        self._sending = hmac.new(sending, digestmod=hashlib.sha256)
        self._receiving = hmac.new(receiving, digestmod=hashlib.sha256)

    def tag(self, parts: Iterable[bytes | memoryview]) -> bytes:
        """The tag of a frame that goes out."""
        mac = self._sending.copy()
        for part in parts:
            mac.update(part)
        return mac.digest()[:TAG_BYTES]

    def check(self, frame: memoryview, tag: memoryview) -> None:
        """Compare a received frame with its tag, in constant time.

        Raises:
            FrameError: with reason `forged`.
        """
        mac = self._receiving.copy()
        mac.update(frame)
        if not hmac.compare_digest(mac.digest()[:TAG_BYTES], tag):
            raise FrameError("forged", "the tag does not match: another key, or bytes were changed on the way")


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """What the base station derives every node's key from."""

    cluster: str
    secret: bytes = field(repr=False)

    def node_key(self, node: str) -> bytes:
        """The key of one node."""
        return _expand(self.secret, f"wdmoe/v1/{self.cluster}/{node}".encode())

    def authenticator(self, node: str) -> FrameAuthenticator:
        """The base station's end of the way to `node`."""
        return _authenticator(self, node)


@lru_cache(maxsize=1024)
def _authenticator(key: ClusterKey, node: str) -> FrameAuthenticator:
    return FrameAuthenticator(key.node_key(node), at_node=False)


class ReplayWindow:
    """Which requests were received before; memory is bounded.

    Of each session the last `_WINDOW` requests are remembered, and any below one that was forgotten is taken for a
    replay: request numbers count up. Of sessions the last `_SESSIONS` are remembered.
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[int, _Session] = OrderedDict()

    def is_new(self, session: int, request: int, attempt: int) -> bool:
        """Whether this was not received before; from now on it was."""
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
        KeyFileError: it can't be read, is none, or another cluster's.
    """
    _, key_cluster, secret = _read(path, _CLUSTER_WORD, 3, "the base station needs the cluster key")
    if key_cluster != cluster:
        raise KeyFileError(f"{path} is the key of cluster '{key_cluster}', not '{cluster}': say --cluster")
    return ClusterKey(cluster, secret)


def read_node_authenticator(path: Path, cluster: str, node: str) -> FrameAuthenticator:
    """The node's end, from the node key in a file.

    Raises:
        KeyFileError: it can't be read, is none, or another node's.
    """
    key_cluster, key_node, secret = _read(path, _NODE_WORD, 4, "a node needs its own key only")
    if (key_cluster, key_node) != (cluster, node):
        raise KeyFileError(
            f"{path} is the key of '{key_node}' in cluster '{key_cluster}', not of '{node}' in '{cluster}'"
        )
    return FrameAuthenticator(secret, at_node=True)


def cluster_key_line(key: ClusterKey) -> bytes:
    """What a cluster key's file holds."""
    return f"{_CLUSTER_WORD} {key.cluster} {key.secret.hex()}\n".encode()


def node_key_line(key: ClusterKey, node: str) -> bytes:
    """What a node key's file holds."""
    return f"{_NODE_WORD} {key.cluster} {node} {key.node_key(node).hex()}\n".encode()


def _read(path: Path, word: str, count: int, hint: str) -> tuple[str, str, bytes]:
    """The last word but two, the last but one, and the secret."""
    words = read_private(path).decode("ascii", errors="replace").split()
    if words and words[0] != word and words[0] in (_CLUSTER_WORD, _NODE_WORD):
        raise KeyFileError(f"{path} is a {words[0]}: {hint}")
    try:
        secret = bytes.fromhex(words[-1]) if len(words) == count and words[0] == word else b""
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise KeyFileError(f"{path} is not a {word}: {hint}, made by 'wdmoe-testbed keys'")
    return words[-3], words[-2], secret


def _expand(key: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt, 32 bytes: one block, so one HMAC for each of its two steps."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")
