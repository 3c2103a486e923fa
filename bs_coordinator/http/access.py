"""Where the server listens, and which callers it lets in. Known before the model is loaded, which takes long."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bs_coordinator.config import ServeConfig
from bs_coordinator.errors import ServeError
from common.errors import KeyFileError
from common.private_files import read_private
from wire.broker_address import is_loopback


class ApiKey(NamedTuple):
    """A key that callers may send.

    Attributes:
        name: of the caller, for the log.
        key: the secret.
        most_requests: requests of this key at the same time; None for no limit of its own.
    """

    name: str
    key: str
    most_requests: int | None = None


@contextmanager
def listening_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets bound to a port at every address of `host`; connections are refused until a server listens on them.

    Raises:
        ServeError: the port is taken, or the address is not this machine's.
    """
    with ExitStack() as stack:
        try:
            # A name may have addresses of both families, and the resolver may name one of them twice.
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
            bound = [_bind(stack, family, address) for family, address in addresses]
        except OSError as error:
            raise ServeError(
                f"can't listen on {host}:{port} ({error.strerror}): choose another --port, or another --host"
            ) from None
        yield bound


def _bind(stack: ExitStack, family: int, address: tuple[object, ...]) -> socket.socket:
    bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    # Connections of an earlier server in TIME_WAIT do not keep the port.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bound.bind(address)
    return bound


def allowed_hosts(host: str, *, keyed: bool) -> list[str]:
    """Names under which requests may ask for a server that listens on `host`; `*` for any.

    Without a key, only names of this machine: a web page whose name is made to resolve to loopback (DNS rebinding)
    would be of the same origin as the server. A key is unknown to such a page.
    """
    if keyed or not is_loopback(host):
        return ["*"]
    return ["localhost", "127.0.0.1", "::1", "[::1]", host]


def read_keys(config: ServeConfig) -> list[ApiKey]:
    """The keys that callers may send; none on loopback without a key file.

    Raises:
        ServeError: `config.host` is beyond loopback, and there is no key file.
        KeyFileError: a file can't be read, or holds no key that a caller could send.
    """
    if config.api_key_file is None and config.api_keys_file is None and not is_loopback(config.host):
        raise ServeError(
            f"--host {config.host} can be reached from other machines: add --api-key-file, and put TLS in front of it"
        )
    keys = [] if config.api_key_file is None else [ApiKey("default", read_api_key(config.api_key_file))]
    return keys + ([] if config.api_keys_file is None else read_named_keys(config.api_keys_file))


def read_api_key(key_file: Path) -> str:
    """The only line of a file.

    Raises:
        KeyFileError: the file can't be read, or holds no key that a caller could send.
    """
    key = read_private(key_file).decode("ascii", "replace").strip()
    if not key:
        raise KeyFileError(f"the API key file {key_file} is empty")
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(f"{key_file} holds no API key: write one line of printable ASCII characters")
    return key


def read_named_keys(path: Path) -> list[ApiKey]:
    """The keys of a file with lines `NAME KEY` or `NAME KEY REQUESTS`; lines that begin with `#` are comments.

    Raises:
        KeyFileError: the file can't be read, or a line is not of this form, or a name or key comes twice.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(read_private(path).decode("ascii", "replace").splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (2, 3) or not line.isascii() or not (words[2:] == [] or _is_count(words[2])):
            raise KeyFileError(
                f"{path}, line {number}: write NAME KEY, or NAME KEY REQUESTS with a number from 1, in ASCII"
            )
        key = ApiKey(words[0], words[1], int(words[2]) if words[2:] else None)
        if any(key.name == other.name or key.key == other.key for other in keys):
            raise KeyFileError(f"{path}, line {number}: the name or the key is in an earlier line: each needs its own")
        keys.append(key)
    if not keys:
        raise KeyFileError(f"the API keys file {path} has no key: write lines NAME KEY")
    return keys


def _is_count(word: str) -> bool:
    return word.isdecimal() and int(word) > 0
