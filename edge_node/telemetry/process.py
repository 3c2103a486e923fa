"""The node's end of the sampler: started once, its latest sample taken whenever there is one.

A process and not a thread: starting tools holds Python's lock for milliseconds, for which a frame would wait.
"""

import logging
import os
import subprocess
import sys
import time

from wire.telemetry import MAX_TELEMETRY_BYTES

log = logging.getLogger(__name__)

EVERY_S = 1.0
_START_AGAIN_S = 10.0


class TelemetryProcess:
    """The sampler of one node."""

    def __init__(self, node: str, boot_id: str, host: str, port: int) -> None:
        """Nothing is started yet.

        Args:
            host, port: of the broker, by which the interface is found that traffic goes over.
        """
        self._arguments = [node, boot_id, host, str(port)]
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = b""
        self._not_before_s = float("-inf")

    def start(self) -> None:
        """Start it; it needs a moment for its first sample."""
        self._not_before_s = time.monotonic() + _START_AGAIN_S
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
        """The latest sample that has come since the last call, encoded; never waits. A sampler that died is started
        again, not too often."""
        if self._process is None:
            if time.monotonic() >= self._not_before_s:
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
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._begun = b""
