"""Broker addresses as users write them: `mqtt://user@host:1883` or `mqtts://…`, never with the password.

Passwords come from a file that only its owner can read, so that they show up neither in `ps` nor in logs.
"""

import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from wire.errors import BrokerAuthError

_DEFAULT_PORT = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens and who we are to it.

    Attributes:
        tls: `mqtts://`.
        ca_file: certificates to trust instead of the system's; TLS only.
    """

    host: str
    port: int
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' if self.tls else ''}://{user}{host}:{self.port}"


def parse_broker_url(url: str, *, password_file: Path | None = None, ca_file: Path | None = None) -> BrokerAddress:
    """The address in an URL.

    Raises:
        ValueError: not such an URL, or it holds a password.
        BrokerAuthError: the password file is missing or readable by others.
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
    if ca_file and not tls:
        raise ValueError("--ca-file needs an mqtts:// URL")
    if password_file and not parts.username:
        raise ValueError("--password-file needs a user in the URL: write mqtt://user@host:1883")
    return BrokerAddress(
        host=parts.hostname,
        port=port,
        tls=tls,
        user=unquote(parts.username) if parts.username else None,
        password=read_secret(password_file) if password_file else None,
        ca_file=ca_file,
    )


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
