"""Connections that begin past the emulated links, and go on over them."""

import socket
import subprocess
import sys
import time
from pathlib import Path

from testbed.network import namespaces
from testbed.network.bypass import bypass
from testbed.network.daemon import BASE_STATION
from testbed.network.emulated import emulated
from testbed.network.uniform import Links, write_network
from tests.needs import needs
from tests.waiting import PATIENCE_S

pytestmark = needs(network=True)

RTT_MS = 40.0
ECHO = """
import socket, sys, threading
def echo(peer):
    while data := peer.recv(65536):
        peer.sendall(data)
listener = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
while True:
    threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""


def exchange_ms(peer: socket.socket, size: int) -> float:
    """Time until all that is sent has come back."""
    began_s = time.perf_counter()
    peer.sendall(bytes(size))
    while size:
        part = peer.recv(65536)
        assert part
        size -= len(part)
    return 1e3 * (time.perf_counter() - began_s)


def test_a_connection_goes_on_over_the_link_when_the_way_past_it_ends(tmp_path: Path) -> None:
    write_network(tmp_path / "network.yaml", "bypass", ["near", "far"], [Links(RTT_MS)])
    with (
        emulated(tmp_path / "network.yaml") as network,
        namespaces.inside(namespaces.namespace(network.spec.name, BASE_STATION)),
    ):
        address = network.node_address("far")
        argv = [*network.prefix("far"), sys.executable, "-c", ECHO, address]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n"
                with bypass(network.spec):
                    before = network.status().nodes[1]
                    peer = socket.create_connection((address, 5000), PATIENCE_S)
                    exchange_ms(peer, 50_000)
                    after = network.status().nodes[1]
                    assert (after.down.sent_bytes, after.up.sent_bytes) == (
                        before.down.sent_bytes,
                        before.up.sent_bytes,
                    )
                with peer:
                    assert exchange_ms(peer, 10_000) >= RTT_MS
                    linked = network.status().nodes[1]
                    assert linked.down.sent_bytes >= after.down.sent_bytes + 10_000
                    assert linked.up.sent_bytes >= after.up.sent_bytes + 10_000
            finally:
                server.kill()
