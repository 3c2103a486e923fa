"""`tegrastats` in the background: it prints a line per interval for as long as it runs."""

import os
import subprocess

from common.child_output import c_locale
from edge_node.telemetry.commands import Commands

_INTERVAL_MS = 1000
_START_AGAIN_S = 60.0
_MOST_BYTES = 64 << 10


class Tegrastats:
    """The running tool; without the tool, there are no lines."""

    def __init__(self, commands: Commands) -> None:
        """Nothing is started yet."""
        self._commands = commands
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = b""
        self._not_before_s = float("-inf")

    def line(self) -> str | None:
        """The latest complete line since the last call, None if there is none; never waits.

        Starts the tool if it is not running, at most once a minute.
        """
        if self._process is None and not self._start():
            return None
        assert self._process is not None  # noqa: S101 - started
        assert self._process.stdout is not None  # noqa: S101 - with a pipe
        try:
            data = os.read(self._process.stdout.fileno(), _MOST_BYTES)
        except BlockingIOError:
            return None
        if not data:
            self._commands.warnings["tegrastats"] += 1
            self.close()
            return None
        *lines, self._begun = (self._begun + data)[-_MOST_BYTES:].split(b"\n")
        return lines[-1].decode(errors="replace") if lines else None

    def close(self) -> None:
        """End the tool."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._begun = b""

    def _start(self) -> bool:
        tool = self._commands.find("tegrastats")
        if tool is None or self._commands.clock.monotonic_s() < self._not_before_s:
            return False
        self._not_before_s = self._commands.clock.monotonic_s() + _START_AGAIN_S
        try:
            self._process = subprocess.Popen(
                [tool, "--interval", str(_INTERVAL_MS)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=c_locale(),
            )
        except OSError:
            self._commands.warnings["tegrastats"] += 1
            return False
        assert self._process.stdout is not None  # noqa: S101 - asked for above
        os.set_blocking(self._process.stdout.fileno(), False)
        return True
