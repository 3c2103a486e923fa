"""The relay's loop over real sockets: frames arrive, and who may keep a core does not sleep in between."""

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from testbed.network.model import AirModel
from testbed.network.relay import Relay, mac
from testbed.network.spec import LinkSpec
from tests.waiting import PATIENCE_S, wait_until

_DELAY_S = 0.01


@pytest.fixture
def ends() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Two pairs instead of TAPs, the base station's first: the host's end and the relay's."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    for pair in pairs:
        for end in pair:
            end.setblocking(False)
    yield pairs
    for pair in pairs:
        for end in pair:
            end.close()


@pytest.mark.parametrize("own_core", [False, True])
def test_frames_are_relayed_and_a_relay_with_a_core_does_not_sleep(
    ends: list[tuple[socket.socket, socket.socket]], own_core: bool
) -> None:
    model = AirModel(1, queue_s=0.1)
    model.configure(time.monotonic(), [LinkSpec(delay_ms=1e3 * _DELAY_S)], shared_air=False)
    relay = Relay([relays.fileno() for _, relays in ends], model, own_core=own_core)
    (base_station, _), (node, _) = ends
    frame = bytes.fromhex((mac(1) + mac(0)).replace(":", "")) + bytes(500)

    def rounds_until_delivered() -> int:
        began = time.monotonic()
        relay.wait(began + 0.03, [])
        assert time.monotonic() - began >= 0.03, "without frames it returns no earlier than the given time"
        base_station.send(frame)
        sent, rounds, received = time.monotonic(), 0, b""
        while not received:
            relay.wait(sent + PATIENCE_S, [])
            rounds += 1
            with contextlib.suppress(BlockingIOError):
                received = node.recv(2000)
        assert received == frame
        assert time.monotonic() - sent >= _DELAY_S
        return rounds

    if own_core:  # many in ten milliseconds, unless another process gets the core meanwhile
        wait_until(lambda: rounds_until_delivered() > 5, "the relay to poll", poll_s=0)
    else:  # one to read it, one to deliver it
        assert max(rounds_until_delivered() for _ in range(3)) <= 3
