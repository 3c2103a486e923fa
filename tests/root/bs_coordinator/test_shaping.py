"""Shares of the down-link: their values, and that the kernel enforces them, in a separate network namespace."""

import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bs_coordinator.airtime.shaping import ShapedLink, shape_commands, time_shares
from bs_coordinator.errors import ShapingError
from bs_coordinator.links import LinkSample
from bs_coordinator.links.log import link_log
from tests.needs import skip_without
from tests.waiting import wait_until

SLOW, FAST = "10.77.0.2", "10.77.0.3"


def test_shares_deliver_all_nodes_rows_at_the_same_time() -> None:
    links = [ShapedLink(SLOW, 20, 3), ShapedLink(FAST, 100, 5), ShapedLink("fd00::1", 50, 2)]
    shares = time_shares(links)
    assert shares.sum() == pytest.approx(1)
    times = [link.rows / (share * link.mbps) for link, share in zip(links, shares, strict=True)]
    assert times == pytest.approx([times[0]] * 3)


def test_invalid_addresses_are_refused() -> None:
    with pytest.raises(ShapingError, match="'pi1' is not an IP address"):
        shape_commands("eth0", [ShapedLink("pi1", 20, 1)])


@pytest.fixture
def namespace() -> Iterator[str]:
    """A namespace with one interface, `bs0`, whose other end answers for both nodes."""
    skip_without("tc", "ip", network=True)
    name = f"wdmoe-test-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        for command in (
            "ip link add bs0 type veth peer name nodes0",
            "ip addr add 10.77.0.1/24 dev bs0",
            "ip link set bs0 up",
            "ip link set nodes0 up",
            f"ip neigh add {SLOW} lladdr 02:00:00:00:00:02 dev bs0",
            f"ip neigh add {FAST} lladdr 02:00:00:00:00:03 dev bs0",
        ):
            _inside(name, *command.split())
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def _inside(namespace: str, *command: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", "netns", "exec", namespace, *command], capture_output=True, text=True, check=False)
    assert not ok or done.returncode == 0, done.stderr
    return done


def _shape(namespace: str, *options: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return _inside(namespace, sys.executable, "-m", "bs_coordinator", "shape", *options, ok=ok)


_SEND = """
import socket, sys
sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in sys.argv[1:]]
for s in sockets:
    s.setblocking(False)
while True:
    for s, address in zip(sockets, sys.argv[1:]):
        try:
            s.sendto(bytes(1400), (address, 9))
        except BlockingIOError:
            pass
"""


def _sent_mbps(namespace: str, *addresses: str) -> dict[str, float]:
    """Rates, or less on a busy machine, at which each class forwards packets that are sent as fast as possible."""

    def sent() -> dict[str, int]:
        shown = _inside(namespace, "tc", "-s", "class", "show", "dev", "bs0").stdout
        return {handle: int(count) for handle, count in re.findall(r"class htb (\S+) [^\n]*\n Sent (\d+) bytes", shown)}

    sender = subprocess.Popen(["ip", "netns", "exec", namespace, sys.executable, "-c", _SEND, *addresses])
    try:
        wait_until(lambda: max(sent().values()) > 0, "packets")
        began_s, before = time.monotonic(), sent()
        time.sleep(1)
        after, took_s = sent(), time.monotonic() - began_s
    finally:
        sender.terminate()
        sender.wait()
    return {handle: 8e-6 * (after[handle] - before[handle]) / took_s for handle in after}


def test_nodes_get_their_shares_and_borrow(namespace: str) -> None:
    # Equal rows: the time is shared 5 : 1, so that both links carry 100 · 20 / 120 Mbit/s.
    said = _shape(namespace, "bs0", "--link", f"{SLOW}=20", "--link", f"{FAST}=100").stdout
    assert said.splitlines() == [
        f"{SLOW}: 83.3% of the time, 16.67 of 20 Mbit/s",
        f"{FAST}: 16.7% of the time, 16.67 of 100 Mbit/s",
    ]
    alone = _sent_mbps(namespace, SLOW)
    assert alone["1:10"] <= 25
    assert alone["1:11"] == 0
    # The root's 100 Mbit/s leave the fast link room to borrow, but the slow one keeps what it was promised. A sender
    # that has too little of a core sends less, but at some time it has enough.
    wait_until(lambda: _sent_mbps(namespace, SLOW)["1:10"] > 15, "the slow link to borrow")

    def shared_as_configured() -> bool:
        together = _sent_mbps(namespace, SLOW, FAST)
        return together["1:10"] == pytest.approx(18, rel=0.25) and together["1:11"] > 30

    wait_until(shared_as_configured, "both links to have their shares")
    # Once more, with other numbers, replaces what was there.
    _shape(namespace, "bs0", "--link", f"{SLOW}=20", "--link", f"{FAST}=20", "--rows", f"{SLOW}=3")
    shown = _inside(namespace, "tc", "class", "show", "dev", "bs0").stdout
    rates = re.findall(r"class htb (\S+) .*?rate (\S+) ceil (\S+)", shown)
    assert sorted(rates) == [("1:1", "20Mbit", "20Mbit"), ("1:10", "15Mbit", "20Mbit"), ("1:11", "5Mbit", "20Mbit")]
    _shape(namespace, "bs0", "--off")
    assert "htb" not in _inside(namespace, "tc", "qdisc", "show", "dev", "bs0").stdout
    _shape(namespace, "bs0", "--off")


def _classes(namespace: str) -> dict[str, tuple[str, str]]:
    shown = _inside(namespace, "tc", "class", "show", "dev", "bs0").stdout
    return {handle: rates for handle, *rates in re.findall(r"class htb (\S+) .*?rate (\S+) ceil (\S+)", shown)}


def _wait_for(namespace: str, handle: str, at_least_mbps: float, at_most_mbps: float) -> None:
    def within() -> bool:
        ceil = _classes(namespace).get(handle, ("", "0Kbit"))[1]
        mbps = float(re.sub(r"[A-Za-z]+", "", ceil)) * (1e-3 if ceil.endswith("Kbit") else 1)
        return at_least_mbps < mbps < at_most_mbps

    wait_until(within, f"{at_least_mbps} to {at_most_mbps} Mbit/s for class {handle}")


def test_shares_follow_the_links_that_a_base_station_measures(namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "links.jsonl"
    nodes = ["--node", f"slow={SLOW}", "--node", f"fast={FAST}"]
    argv = [sys.executable, "-m", "bs_coordinator", "shape", "bs0", "--follow", str(path), *nodes, "--every", "0.2"]
    with link_log(path) as write:

        def measure(began_s: float, **mbps: float) -> None:
            for i in range(20):
                for node, rate in mbps.items():
                    now_s = began_s + 0.1 * i
                    write(LinkSample(now_s, node, 30_000, 0, 8e-6 * 30_000 / rate, 0.0, train=True))
                    write(LinkSample(now_s, node, 1200, 1200, 0.006, 1e-3, experts=1, rows=1))

        measure(100, slow=20, fast=100)
        with subprocess.Popen(["ip", "netns", "exec", namespace, *argv], stdout=subprocess.DEVNULL) as shaper:
            try:
                _wait_for(namespace, "1:10", 22, 28)  # with a quarter of headroom
                _wait_for(namespace, "1:11", 110, 140)
                measure(110, slow=5, fast=100)
                _wait_for(namespace, "1:10", 5, 7)
            finally:
                shaper.send_signal(signal.SIGINT)
            assert shaper.wait() == 130
    assert not _classes(namespace)


def test_failures_end_in_one_line_and_leave_nothing(namespace: str) -> None:
    missing = _shape(namespace, "eth7", "--link", f"{SLOW}=20", ok=False)
    assert missing.returncode == ShapingError.exit_code
    assert "eth7" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1
    for options in (["bs0"], ["bs0", "--off", "--link", f"{SLOW}=2"], ["bs0", "--link", f"{SLOW}=0"]):
        assert _shape(namespace, *options, ok=False).returncode == 2
    assert "htb" not in _inside(namespace, "tc", "qdisc", "show", "dev", "bs0").stdout
