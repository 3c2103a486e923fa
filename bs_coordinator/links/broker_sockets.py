"""TCP facts of a broker's connections to its clients, read with `ss` if the broker runs in this network namespace."""

import logging
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil

from common.child_output import run_parsed
from wire.status import SocketFacts

log = logging.getLogger(__name__)

_EVERY_S = 2.0
_TIMEOUT_S = 2.0
_LINE = re.compile(r"^ESTAB\s+\d+\s+\d+\s+\S+\s+(?P<peer>\S+)\s(?P<info>.*)$")
_MIN_RTT = re.compile(r"\bminrtt:(\d{1,9}(?:\.\d{1,9})?)(?![\d.])")
_RATE = re.compile(r"\bdelivery_rate (\d{1,15})bps")
_MAPPED = re.compile(r"^\[::ffff:([\d.]+)\](:\d+)$")


def parse_ss(text: str) -> dict[str, SocketFacts]:
    """Facts by client endpoint (`address:port`), from the output of `ss -tinHO`; lines without a rate are skipped."""
    facts = {}
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if not match:
            continue
        rate, min_rtt = _RATE.search(match["info"]), _MIN_RTT.search(match["info"])
        if not rate or not min_rtt:
            continue
        # A dual-stack listener shows IPv4 clients as mapped addresses.
        endpoint = _MAPPED.sub(r"\1\2", match["peer"])
        facts[endpoint] = SocketFacts(
            endpoint=endpoint,
            min_rtt_us=int(1e3 * float(min_rtt[1])),
            delivery_bytes_per_s=int(rate[1]) // 8,
            app_limited="app_limited" in match["info"],
        )
    return facts


def read_broker_sockets(port: int) -> dict[str, SocketFacts]:
    """Facts by client endpoint of a broker on `port` of this host; empty if `ss` is missing or fails."""
    ss = shutil.which("ss") or shutil.which("ss", path="/usr/sbin:/sbin")
    if ss is None:
        return {}
    try:
        argv = [ss, "-tinHO", "state", "established", "sport", "=", f":{port}"]
        # With a state filter, ss omits the state column that `parse_ss` expects.
        done = run_parsed(argv, timeout_s=_TIMEOUT_S)
        done.check_returncode()
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("ss: %s", error)
        return {}
    return parse_ss("".join(f"ESTAB {line.strip()}\n" for line in done.stdout.splitlines()))


def is_local(host: str) -> bool:
    """Whether `host` is an address of this host, in this network namespace."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {address.address for card in psutil.net_if_addrs().values() for address in card}
    return bool(addresses & own)


class BrokerSockets:
    """Reads the facts every two seconds in its own thread, because running `ss` takes as long as a layer."""

    def __init__(self) -> None:
        self._new: Mapping[str, SocketFacts] = {}

    def take(self) -> Mapping[str, SocketFacts]:
        """The newest facts by client endpoint; empty if nothing was read since the last call."""
        new = self._new
        if new:
            self._new = {}
        return new

    @contextmanager
    def watching(self, port: int) -> Iterator[None]:
        """Read the sockets of a broker on `port` while the context lasts."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_EVERY_S):
                self._new = read_broker_sockets(port)

        thread = threading.Thread(target=watch, name="broker-sockets", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(_TIMEOUT_S + 1)
