"""Where the server listens, and which callers it lets in. Known before the model is loaded, which takes long."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bs_coordinator.errors import ServeError
from common.errors import KeyFileError
from common.private_files import read_private
from wire.broker_address import is_loopback


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


def allowed_hosts(host: str, api_key: str | None) -> list[str]:
    """Names under which requests may ask for a server that listens on `host`; `*` for any.

    Without a key, only names of this machine: a web page whose name is made to resolve to loopback (DNS rebinding)
    would be of the same origin as the server. A key is unknown to such a page.
    """
    if api_key is not None or not is_loopback(host):
        return ["*"]
    return ["localhost", "127.0.0.1", "::1", "[::1]", host]


def read_api_key(key_file: Path | None, *, host: str) -> str | None:
    """The API key that callers must send; None on loopback without a key file.

    Raises:
        ServeError: `host` is beyond loopback, and there is no key file.
        KeyFileError: the file can't be read, or holds no key that a caller could send.
    """
    if key_file is None and not is_loopback(host):
        raise ServeError(
            f"--host {host} can be reached from other machines: add --api-key-file, and put TLS in front of it"
        )
    if key_file is None:
        return None
    key = read_private(key_file).decode("ascii", "replace").strip()
    if not key:
        raise KeyFileError(f"the API key file {key_file} is empty")
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(f"{key_file} holds no API key: write one line of printable ASCII characters")
    return key
