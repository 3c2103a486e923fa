"""Compare an emulated network with its description: iperf3 and ping against the configured links.

Tolerances: rates within 8 %, round trips within 0.7 ms. Each node is measured alone, with the profile held.
Rates are TCP goodput; on a link with loss, where TCP itself backs off, they are UDP goodput at 1.2 times the rate, and
the loss shows as missing goodput. A round trip is the mean of small pings over an empty link: twice the delay, plus
the pings' own air time.
"""

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct
from rich import box
from rich.console import Console
from rich.table import Table

from common.child_output import c_locale, run_parsed
from testbed.errors import NetworkError, PreflightError
from testbed.iperf3 import received_mbps
from testbed.network.emulated import EmulatedNetwork
from testbed.network.model import ETHERNET_BYTES, MTU_BYTES, air_bits
from testbed.network.spec import LinkSpec

RATE_TOLERANCE = 0.08
RTT_TOLERANCE_MS = 0.7

_PINGS = 200
_PING_INTERVAL_S = 0.01
_PING_BYTES = 56
_PING_FRAME_BYTES = ETHERNET_BYTES + 20 + 8 + _PING_BYTES
_UDP_PAYLOAD_BYTES = MTU_BYTES - 28
_UDP_OVERLOAD = 1.2
_RTT_LINE = re.compile(r"\b(?:icmp_)?seq=(\d{1,9})\b.*\btime[=<](\d{1,9}(?:[.,]\d{1,9})?) ?ms\b")


class RateCheck(Struct, frozen=True):
    """Goodput of one direction of a link, in Mbit/s."""

    configured_mbps: float
    measured_mbps: float

    @property
    def error(self) -> float:
        """Relative error: measured / configured - 1."""
        return self.measured_mbps / self.configured_mbps - 1


class NodeCheck(Struct, frozen=True):
    """Configured and measured properties of one node's link.

    Attributes:
        expected_rtt_ms: configured round trip of a ping.
        measured_rtt_ms: mean round trip.
        median_rtt_ms: median round trip, which single delays of a busy machine affect less; for information only.
        lost_percent: lost round trips; a link with loss p loses 1 - (1 - p)² of them.
        late_ms: largest delay that the relay itself added during the check.
        cpu_percent: largest share of one core that the relay took during the check.
    """

    profile: str
    node: str
    link: LinkSpec
    down: RateCheck
    up: RateCheck
    expected_rtt_ms: float
    measured_rtt_ms: float
    median_rtt_ms: float
    lost_percent: float
    late_ms: float
    cpu_percent: float

    @property
    def rates(self) -> tuple[RateCheck, RateCheck]:
        """Rates of both directions, down first."""
        return self.down, self.up

    @property
    def rtt_error_ms(self) -> float:
        """Measured minus expected round trip, in ms."""
        return self.measured_rtt_ms - self.expected_rtt_ms

    @property
    def within(self) -> bool:
        """Whether rates and round trip are within the tolerances."""
        rates = all(abs(rate.error) <= RATE_TOLERANCE for rate in self.rates)
        return rates and abs(self.rtt_error_ms) <= RTT_TOLERANCE_MS


def check_network(
    network: EmulatedNetwork,
    *,
    profiles: Sequence[str],
    nodes: Sequence[str],
    at_s: float = 0.0,
    seconds: float = 2.0,
    out: Path | None = None,
    console: Console | None = None,
) -> list[NodeCheck]:
    """Measure links, print a table per profile, and write the results.

    Args:
        profiles: checked in this order; if empty, the active one. The profile active before is restored afterwards.
        nodes: ids of the nodes to check.
        at_s: moment of each profile to hold it at, in seconds.
        seconds: duration of each rate measurement.
        out: JSON file for all results.

    Raises:
        PreflightError: iperf3 or ping is missing.
        NetworkError: a link is outside the tolerances, or can't be measured.
    """
    for tool, package in (("iperf3", "iperf3"), ("ping", "iputils-ping")):
        if shutil.which(tool) is None:
            raise PreflightError(f"'net check' needs {tool}: install {package}")
    console = console or Console()
    before = network.status().profile
    results: list[NodeCheck] = []
    try:
        for profile in profiles or (before,):
            network.set_profile(profile)
            network.hold(at_s)
            for node in nodes:
                with console.status(f"{profile}, {node}"):
                    results.append(check_node(network, profile, node, seconds=seconds))
            _print([result for result in results if result.profile == profile], console)
    finally:
        network.set_profile(before)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f"{out.name}.tmp")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(results)))
        temporary.rename(out)
    if beyond := [f"{result.profile} {result.node}" for result in results if not result.within]:
        raise NetworkError(
            f"{len(beyond)} of {len(results)} links differ by more than {RATE_TOLERANCE:.0%} or {RTT_TOLERANCE_MS} ms "
            f"from what is configured ({', '.join(beyond[:8])}): is this machine busy?"
        )
    return results


def check_node(network: EmulatedNetwork, profile: str, node: str, *, seconds: float = 2.0) -> NodeCheck:
    """Measure one node's link as currently configured.

    Raises:
        NetworkError: the link can't be measured.
    """
    link = next(n.link for n in network.status().nodes if n.node == node)
    rtts, lost_percent = _ping(network, node)
    late_ms = network.status().late_ms
    rates = []
    cpu_percent = 0.0
    for reverse, mbps in ((False, link.down_mbps), (True, link.up_mbps)):
        measured = _iperf(network, node, link, mbps, reverse=reverse, seconds=seconds)
        rates.append(RateCheck(_udp_mbps(link, mbps) if link.loss_percent else mbps, measured))
        status = network.status()
        late_ms, cpu_percent = max(late_ms, status.late_ms), max(cpu_percent, status.cpu_percent)
    return NodeCheck(
        profile=profile,
        node=node,
        link=link,
        down=rates[0],
        up=rates[1],
        expected_rtt_ms=2 * link.delay_ms + _ping_air_ms(link),
        measured_rtt_ms=statistics.fmean(rtts),
        median_rtt_ms=statistics.median(rtts),
        lost_percent=lost_percent,
        late_ms=late_ms,
        cpu_percent=cpu_percent,
    )


def _udp_mbps(link: LinkSpec, mbps: float) -> float:
    """Goodput of full UDP packets on an overloaded link; UDP headers are shorter than TCP's."""
    share = _UDP_PAYLOAD_BYTES * 8 / air_bits(ETHERNET_BYTES + MTU_BYTES)
    return mbps * share * (1 - link.loss_percent / 100)


def _ping_air_ms(link: LinkSpec) -> float:
    bits = air_bits(_PING_FRAME_BYTES)
    return bits / link.down_mbps / 1e3 + bits / link.up_mbps / 1e3


def _ping(network: EmulatedNetwork, node: str) -> tuple[list[float], float]:
    """Return round trips in ms, and the percentage of pings lost."""
    address = network.node_address(node)
    # The first ping also waits for ARP, so these are not counted.
    _run([*network.bs_prefix(), "ping", "-n", "-q", "-c", "3", "-i", "0.05", "-W", "2", address], timeout_s=20)
    argv = ["ping", "-n", "-c", str(_PINGS), "-i", str(_PING_INTERVAL_S), "-W", "1", "-s", str(_PING_BYTES), address]
    done = _run([*network.bs_prefix(), *argv], timeout_s=30)
    rtts = parse_ping(done.stdout)
    if not rtts:
        raise NetworkError(f"{node} does not answer pings: {_last_line(done)}")
    return rtts, 100 * (1 - len(rtts) / _PINGS)


def parse_ping(output: str) -> list[float]:
    """Round trips in ms from ping's output; of an answer that arrives twice, the first counts."""
    by_sequence: dict[str, float] = {}
    for sequence, ms in _RTT_LINE.findall(output):
        by_sequence.setdefault(sequence, float(ms.replace(",", ".")))
    return list(by_sequence.values())


def _iperf(network: EmulatedNetwork, node: str, link: LinkSpec, mbps: float, *, reverse: bool, seconds: float) -> float:
    """Goodput in Mbit/s at the receiver, without the first second's slow start."""
    argv = ["iperf3", "--json", "-c", network.node_address(node), "-t", str(seconds), "-O", "1"]
    if reverse:
        argv.append("--reverse")
    if link.loss_percent:
        argv += ["--udp", "--length", str(_UDP_PAYLOAD_BYTES), "--bitrate", f"{mbps * _UDP_OVERLOAD}M"]
    with _iperf_server(network, node):
        done = _run([*network.bs_prefix(), *argv], timeout_s=seconds + 20)
    try:
        return received_mbps(done.stdout)
    except ValueError as error:
        raise NetworkError(f"iperf3 to {node} gives no result: {error}: {_last_line(done)}") from None


@contextmanager
def _iperf_server(network: EmulatedNetwork, node: str) -> Iterator[None]:
    server = subprocess.Popen(
        [*network.prefix(node), "iperf3", "--server", "--one-off"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=c_locale(),
    )
    try:
        _wait_for_listener(network, node, server)
        yield
    finally:
        server.kill()
        server.wait()


def _wait_for_listener(network: EmulatedNetwork, node: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until iperf3 listens, without connecting: with --one-off it serves only one client."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise NetworkError(f"iperf3 exited at once on {node}: is another iperf3 running there?")
        sockets = _run([*network.prefix(node), "cat", "/proc/net/tcp", "/proc/net/tcp6"], timeout_s=10).stdout
        if any(line.split()[1].endswith(":1451") and line.split()[3] == "0A" for line in sockets.splitlines()):
            return
        time.sleep(0.02)
    raise NetworkError(f"iperf3 did not start listening on {node} within 10 s")


def _run(argv: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return run_parsed(argv, timeout_s=timeout_s)
    except subprocess.TimeoutExpired:
        raise NetworkError(f"{' '.join(argv[3:6])} … did not end within {timeout_s:g} s") from None


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def _print(results: Sequence[NodeCheck], console: Console) -> None:
    table = Table(title=f"profile {results[0].profile}: measured, configured, difference", box=box.SIMPLE)
    table.add_column("node")
    for column in ("down Mbit/s", "up Mbit/s", "round trip ms", "lost %"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in results:
        table.add_row(
            result.node, *(f"{r.measured_mbps:.1f} {r.configured_mbps:.1f} {r.error:+.1%}" for r in result.rates),
            f"{result.measured_rtt_ms:.2f} {result.expected_rtt_ms:.2f} {result.rtt_error_ms:+.2f}",
            f"{result.lost_percent:.1f}", "ok" if result.within else "[red]beyond[/red]",
        )  # fmt: skip
    console.print(table)
