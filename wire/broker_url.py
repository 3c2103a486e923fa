"""Broker addresses as users write them: `mqtt://user@host:1883` or `mqtts://…`, never with the password.

Passwords come from a file that only its owner can read, so that they show up neither in `ps` nor in logs.
"""

import ipaddress
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit

from common.config import Config, Option
from common.private_files import check_private
from wire.errors import BrokerAuthError, PlaintextError

_DEFAULT_PORT = {"mqtt": 1883, "mqtts": 8883}


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


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens and who we are to it.

    Attributes:
        tls: `mqtts://`.
        ca_file, tls_cert, tls_key: see `Access`.
    """

    host: str
    port: int
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def on_loopback(self) -> bool:
        """Whether nothing leaves this machine."""
        return is_loopback(self.host)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' if self.tls else ''}://{user}{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_NO_ACCESS = Access()


def parse_broker_url(url: str, access: Access = _NO_ACCESS) -> BrokerAddress:
    """The address in an URL.

    Raises:
        ValueError: not such an URL, or it holds a password.
        BrokerAuthError: the password file is missing or readable by others.
        KeyFileError: so is the key of the certificate.
        PlaintextError: without TLS beyond loopback.
    """
    parts = urlsplit(url)
    example = "write for example mqtt://192.168.1.10:1883 or mqtts://node1@broker.local"
    if parts.scheme not in _DEFAULT_PORT or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"'{_without_password(url)}' is not a broker URL: {example}")
    if parts.password is not None:
        raise ValueError("a password in the URL would show up in ps and logs: use --password-file")
    try:
        port = parts.port or _DEFAULT_PORT[parts.scheme]
    except ValueError:
        raise ValueError(f"'{url}' has no valid port: {example}") from None
    tls = parts.scheme == "mqtts"
    if not tls and (access.ca_file or access.tls_cert or access.tls_key):
        raise ValueError("--ca-file, --tls-cert and --tls-key need an mqtts:// URL")
    if (access.tls_cert is None) != (access.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    if access.password_file and not parts.username:
        raise ValueError("--password-file needs a user in the URL: write mqtt://user@host:1883")
    if access.tls_key:
        check_private(access.tls_key)
    address = BrokerAddress(
        host=parts.hostname,
        port=port,
        tls=tls,
        user=unquote(parts.username) if parts.username else None,
        password=read_secret(access.password_file) if access.password_file else None,
        ca_file=access.ca_file,
        tls_cert=access.tls_cert,
        tls_key=access.tls_key,
    )
    if not (tls or access.allow_plaintext or address.on_loopback):
        raise PlaintextError(
            f"{address} would carry everything unencrypted over the network: use mqtts:// "
            "('wdmoe-testbed keys' makes what it needs), or say --allow-plaintext"
        )
    return address


def read_secret(path: Path) -> str:
    """First line of a secret file.

    Raises:
        BrokerAuthError: it can't be read, is empty, or others may read it.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise BrokerAuthError(f"{path} can be read by others (mode {mode:o}): run 'chmod 600 {path}'")
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
