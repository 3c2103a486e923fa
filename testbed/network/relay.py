"""Carries frames from TAP to TAP through the link model. Only this module reads the clock and does I/O on frames.

One thread with one loop. Lateness adds to the emulated delays, so all work in the loop is bounded and it blocks only to
wait for the next frame or delivery. Waking up takes ten times as long as handling a frame: with a core of its own the
relay busy-waits while frames arrive.
"""

import contextlib
import os
import select
import time
from collections.abc import Sequence

from testbed.network.model import ETHERNET_BYTES, MTU_BYTES, AirModel, Direction

_FRAME_BYTES = ETHERNET_BYTES + MTU_BYTES + 4
_FULL_BYTES = ETHERNET_BYTES + MTU_BYTES
_BATCH = 64
"""Frames read from one TAP before the next TAP is read."""
_ALERT_S = 0.02
"""How long a relay with a core of its own busy-waits after a frame."""
_BASE_STATION = 0
_BROADCAST_BIT = 1


def mac(index: int) -> str:
    """Locally administered MAC address: index 0 is the base station, k + 1 is node k."""
    return f"02:57:44:4d:00:{index:02x}"


class Relay:
    """Carries frames between the base station's TAP and the nodes'.

    Args:
        taps: non-blocking descriptors, the base station's first.
        own_core: busy-wait while frames arrive.

    Attributes:
        refused_frames: frames that the receiver's kernel did not accept.
    """

    def __init__(self, taps: Sequence[int], model: AirModel, *, own_core: bool = False) -> None:
        self._taps = list(taps)
        self._model = model
        self._index = {tap: index for index, tap in enumerate(taps)}
        self._by_mac = {bytes.fromhex(mac(index).replace(":", "")): index for index in range(len(taps))}
        self._alert_s = _ALERT_S if own_core else 0.0
        self._alert_until = self._worst_late_s = 0.0
        self.refused_frames = 0

    def wait(self, until: float, others: Sequence[int]) -> list[int]:
        """Wait for frames or the next delivery, and carry frames.

        Args:
            until: latest time to return, on the monotonic clock.
            others: further descriptors to wait for.

        Returns:
            Those of `others` that are readable.
        """
        now = time.monotonic()
        pause_s = min(until, self._model.wake_at()) - now if now >= self._alert_until else 0.0
        ready, _, _ = select.select([*self._taps, *others], (), (), max(0.0, pause_s))
        self._deliver()
        for fileno in ready:
            if fileno in self._index:
                self._read(fileno)
        # Frames just read may already be due, on an idle link without delay.
        self._deliver()
        return [fileno for fileno in ready if fileno not in self._index]

    def take_worst_late_s(self) -> float:
        """Largest lateness of a delivery since the last call, in seconds."""
        worst_s, self._worst_late_s = self._worst_late_s, 0.0
        return worst_s

    def _deliver(self) -> None:
        now = time.monotonic()
        late_s = now - self._model.wake_at()
        if late_s < 0:
            return
        self._worst_late_s = max(self._worst_late_s, late_s)
        for node, direction, frame in self._model.due(now):
            receiver = node + 1 if direction is Direction.DOWN else _BASE_STATION
            try:
                os.write(self._taps[receiver], frame)
            except OSError:
                # The interface was taken down, or the kernel is out of memory: count the frame as lost.
                self.refused_frames += 1

    def _read(self, tap: int) -> None:
        index = self._index[tap]
        now = time.monotonic()
        self._alert_until = now + self._alert_s
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BATCH):
                frame = os.read(tap, _FRAME_BYTES)
                for receiver in self._receivers(index, frame):
                    if index == _BASE_STATION:
                        self._model.offer(now, receiver - 1, Direction.DOWN, frame)
                    else:
                        self._model.offer(now, index - 1, Direction.UP, frame)
                if len(frame) < _FULL_BYTES:
                    # Probably the last of a burst: one more read costs more than another select().
                    break

    def _receivers(self, sender: int, frame: bytes) -> Sequence[int]:
        """Broadcasts go to all hosts of the other side; there are no links between nodes."""
        if frame[0] & _BROADCAST_BIT:
            return range(1, len(self._taps)) if sender == _BASE_STATION else (_BASE_STATION,)
        receiver = self._by_mac.get(frame[:6], sender)
        return (receiver,) if (receiver == _BASE_STATION) != (sender == _BASE_STATION) else ()
