"""The transports by the scheme of a broker's URL: each module here lists its own in `SCHEMES`.

A new transport is one new module in this folder. Modules are imported when the first address is looked at, so that
importing this package costs nothing.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from wire.broker_address import BrokerAddress
from wire.transport import LastWill, Scheme, Transport


@cache
def schemes() -> Mapping[str, Scheme]:
    """All schemes by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return MappingProxyType({scheme.name: scheme for module in modules for scheme in module.SCHEMES})


def connect(
    address: BrokerAddress, client_id: str, *, will: LastWill | None = None, timeout_s: float = 10.0
) -> Transport:
    """Connect to a broker with the transport that its address names (`wire.transport.Connect`).

    Raises:
        BrokerAuthError: user, password or certificate is refused, or the broker's certificate is not trusted.
        BrokerError: not reachable within `timeout_s`, or refused for another reason.
    """
    return schemes()[address.scheme].connect(address, client_id, will=will, timeout_s=timeout_s)
