"""Broker addresses as users write them: `mqtt://user@host:1883` or `mqtts://…`, never with the password.

Passwords come from a file that only its owner can read, so that they show up neither in `ps` nor in logs.
"""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, unquote, urlsplit

from common.config import Config, Option
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
        ValueError: not a broker's URL, it holds a password, or it does not fit the options in `access`.
        BrokerAuthError: the password file is missing, empty or readable by others.
        KeyFileError: the private key's file is missing or readable by others.
        PlaintextError: the URL leaves this machine without TLS, and that is not allowed.
    """
    parts = urlsplit(url)
    scheme = schemes().get(parts.scheme)
    if scheme is None or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"'{_without_password(url)}' is not a broker URL: {_EXAMPLE}")
    _check_access(parts, scheme, access)
    address = BrokerAddress(
        host=parts.hostname,
        port=_port(parts, scheme),
        scheme=scheme.name,
        tls=scheme.tls,
        in_process=scheme.in_process,
        user=unquote(parts.username) if parts.username else None,
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


def _check_access(parts: SplitResult, scheme: Scheme, access: Access) -> None:
    if parts.password is not None:
        raise ValueError("a password in the URL would show up in ps and logs: use --password-file")
    if not scheme.tls and (access.ca_file or access.tls_cert or access.tls_key):
        raise ValueError("--ca-file, --tls-cert and --tls-key need an mqtts:// URL")
    if (access.tls_cert is None) != (access.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
    if access.password_file and not parts.username:
        raise ValueError("--password-file needs a user in the URL: write mqtt://user@host:1883")
    if access.tls_key:
        check_private(access.tls_key)


def _port(parts: SplitResult, scheme: Scheme) -> int:
    try:
        return parts.port or scheme.default_port or 0
    except ValueError:
        raise ValueError(f"'{_without_password(parts.geturl())}' has no valid port: {_EXAMPLE}") from None


def read_secret(path: Path) -> str:
    """The first line of a password file.

    Raises:
        BrokerAuthError: the file can't be read, is empty, or others may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise BrokerAuthError(f"{path} can be read by other users (mode {mode:o}): run 'chmod 600 {path}'")
        secret = path.read_text().partition("\n")[0]
    except OSError as error:
        raise BrokerAuthError(f"can't read the password file {path}: {error.strerror}") from None
    if not secret:
        raise BrokerAuthError(f"the password file {path} is empty")
    return secret


def _without_password(url: str) -> str:
    head, at, host = url.rpartition("@")
    scheme, sep, user = head.rpartition("//")
    return f"{scheme}{sep}{user.partition(':')[0]}{at}{host}"
