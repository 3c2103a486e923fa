"""The sampler's process as the node sees it: start it, take its latest sample, start it again if it dies.

It is a process and not a thread because starting tools holds Python's lock for milliseconds, which delays frames.
"""

import logging
import os
import subprocess
import sys

from common.clock import SYSTEM_CLOCK, Clock
from wire.telemetry import MAX_TELEMETRY_BYTES

log = logging.getLogger(__name__)

EVERY_S = 1.0
_START_AGAIN_S = 10.0


class TelemetryProcess:
    """The sampler of one node."""

    def __init__(self, node: str, boot_id: str, host: str, port: int, *, clock: Clock = SYSTEM_CLOCK) -> None:
        """Nothing is started yet.

        Args:
            host, port: of the broker; the route to it tells which interface traffic goes over.
            clock: for the pause before a sampler that died is started again.
        """
        self._clock = clock
        self._arguments = [node, boot_id, host, str(port)]
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = b""
        self._not_before_s = float("-inf")

    def start(self) -> None:
        """Start the process. Its first sample takes a moment."""
        self._not_before_s = self._clock.monotonic_s() + _START_AGAIN_S
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edge_node.telemetry", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
        except OSError as error:
            log.warning("no telemetry: %s", error)
            return
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        os.set_blocking(self._process.stdout.fileno(), False)

    def take(self) -> bytes | None:
        """The latest encoded sample since the last call, None if there is none; never waits.

        A sampler that died is started again, at most every 10 s.
        """
        if self._process is None:
            if self._clock.monotonic_s() >= self._not_before_s:
                self.start()
            return None
        assert self._process.stdout is not None  # noqa: S101 - see start
        try:
            data = os.read(self._process.stdout.fileno(), 4 * MAX_TELEMETRY_BYTES)
        except BlockingIOError:
            return None
        if not data:
            log.warning("the telemetry sampler ended; starting it again")
            self.close()
            return None
        *lines, self._begun = (self._begun + data)[-2 * MAX_TELEMETRY_BYTES :].split(b"\n")
        return lines[-1] if lines and len(lines[-1]) <= MAX_TELEMETRY_BYTES else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._begun = b""
