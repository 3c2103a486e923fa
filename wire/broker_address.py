"""Where a broker listens. `wire.broker_url` makes addresses from what users write."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker listens, and as which user to connect.

    Attributes:
        scheme: name of a transport (`wire.transports`).
        tls: connections are encrypted, and certificates checked.
        in_process: the broker is a part of this process, so that there are no sockets.
        ca_file, tls_cert, tls_key: as in `wire.broker_url.Access`.
    """

    host: str
    port: int
    scheme: str = "mqtt"
    tls: bool = False
    in_process: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def on_loopback(self) -> bool:
        """Whether nothing leaves this machine."""
        return self.in_process or is_loopback(self.host)

    def __str__(self) -> str:
        user = f"{quote(self.user, safe='')}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}://{user}{host}{port}"


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
