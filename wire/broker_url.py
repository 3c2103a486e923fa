"""Broker addresses as users write them: `mqtt://user@host:1883` or `mqtts://…`, never with the password.

Passwords come from a file that only its owner can read, so that they show up neither in `ps` nor in logs.
"""

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import unquote, urlsplit

from common.config import Config, Option
from common.names import check_host
from common.private_files import check_private
from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, PlaintextError
from wire.transport import Scheme
from wire.transports import schemes

_EXAMPLE = "write for example mqtt://192.168.1.10:1883 or mqtts://node1@broker.local"


@dataclass(frozen=True, slots=True)
class Access(Config):
    """Broker credentials and TLS."""

    password_file: Annotated[Path | None, Option("Password of the user in the broker's URL; a file of mode 600.")] = (
        None
    )
    ca_file: Annotated[
        Path | None, Option("CA certificates to trust for mqtts:// instead of the system's.", exists=True)
    ] = None
    tls_cert: Annotated[
        Path | None, Option("Client certificate for mqtts:// brokers that require one.", exists=True)
    ] = None
    tls_key: Annotated[Path | None, Option("Private key of the client certificate; a file of mode 600.")] = None
    allow_plaintext: Annotated[bool, Option("Allow mqtt:// without TLS to other machines.")] = False


_NO_ACCESS = Access()


def parse_broker_url(url: str, access: Access = _NO_ACCESS) -> BrokerAddress:
    """The address in a URL.

    Raises:
        ValueError: not a broker's URL, it holds a password, or it does not fit the options in `access`. The message
            repeats nothing of the URL but a host that has been told apart from everything else in it.
        BrokerAuthError: the password file is missing, empty or readable by others.
        KeyFileError: the private key's file is missing or readable by others.
        PlaintextError: the URL leaves this machine without TLS, and that is not allowed.
    """
    scheme, user, host, port = _split(url)
    _check_access(user, scheme, access)
    address = BrokerAddress(
        host=host,
        port=port,
        scheme=scheme.name,
        tls=scheme.tls,
        in_process=scheme.in_process,
        user=user,
        password=read_secret(access.password_file) if access.password_file else None,
        ca_file=access.ca_file,
        tls_cert=access.tls_cert,
        tls_key=access.tls_key,
    )
    if not (address.tls or address.on_loopback or access.allow_plaintext):
        raise PlaintextError(
            f"{address} would carry everything unencrypted over the network: use mqtts:// "
            "('wdmoe-testbed keys' makes the certificates), or --allow-plaintext"
        )
    return address


def check_broker_url(url: str) -> None:
    """Check a URL without reading the files that belong to it.

    Raises:
        ValueError: as `parse_broker_url`.
    """
    _split(url)


def without_credentials(text: str) -> str:
    """A word of a command line, without the user name and password of a URL in it, whatever characters they have."""
    head, at, tail = text.rpartition("@")
    if not at or ":" not in head:
        return text
    kept = re.match(r"(?:--[\w-]+=)?(?:\w+:/*)?", head)
    return f"{kept[0] if kept else ''}{tail}"


class _Parts(NamedTuple):
    scheme: Scheme
    user: str | None
    host: str
    port: int


def _split(url: str) -> _Parts:
    # What stands between two delimiters may be a piece of a password that contains one of them: no message repeats it.
    if not url.isprintable() or " " in url:  # urlsplit leaves some of them out
        raise ValueError(f"not a broker URL: it has white space or control characters; {_EXAMPLE}")
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets or characters that no host can have; Python's message repeats the whole URL
        raise ValueError(f"not a broker URL: its host or user can't be read; {_EXAMPLE}") from None
    scheme = schemes().get(parts.scheme)
    if scheme is None:
        raise ValueError(
            f"not a broker URL: it begins with none of {', '.join(f'{s}://' for s in schemes())}; {_EXAMPLE}"
        )
    if parts.password is not None or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("a password in the URL would show up in ps and logs: use --password-file")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(f"not a broker URL: it goes on after host and port; {_EXAMPLE}")
    if not parts.hostname:
        raise ValueError(f"not a broker URL: it names no host; {_EXAMPLE}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 and scheme.default_port is not None:
        raise ValueError(f"not a broker URL: it has no valid port (1 to 65535); {_EXAMPLE}")
    user = unquote(parts.username) if parts.username else None
    if user is not None and not (user.isprintable() and "\N{REPLACEMENT CHARACTER}" not in user):
        raise ValueError(f"not a broker URL: its user has characters that can't be printed; {_EXAMPLE}")
    if "[" in parts.netloc and ":" not in parts.hostname:
        raise ValueError(f"not a broker URL: only IPv6 addresses stand in brackets; {_EXAMPLE}")
    host = check_host(parts.hostname.replace("%25", "%"))  # RFC 6874: a zone follows %25
    return _Parts(scheme, user, host, port or scheme.default_port or 0)


def _check_access(user: str | None, scheme: Scheme, access: Access) -> None:
    if not scheme.tls and (access.ca_file or access.tls_cert or access.tls_key):
        raise ValueError("--ca-file, --tls-cert and --tls-key need an mqtts:// URL")
    if (access.tls_cert is None) != (access.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
    if access.password_file and user is None:
        raise ValueError("--password-file needs a user in the URL: write mqtt://user@host:1883")
    if access.tls_key:
        check_private(access.tls_key)


def read_secret(path: Path) -> str:
    """The first line of a password file.

    Raises:
        BrokerAuthError: the file can't be read, is empty or not UTF-8, or others may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise BrokerAuthError(f"{path} can be read by other users (mode {mode:o}): run 'chmod 600 {path}'")
        secret = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    except OSError as error:
        raise BrokerAuthError(f"can't read the password file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BrokerAuthError(f"the password file {path} is not text in UTF-8") from None
    if not secret:
        raise BrokerAuthError(f"the password file {path} is empty")
    return secret
