"""Running the system's tools with a deadline; a tool that fails repeatedly is left alone for a while."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from common.clock import SYSTEM_CLOCK, Clock
from edge_node.telemetry.parsed import Parsed

_T = TypeVar("_T")

TIMEOUT_S = 0.5
_MOST_CHARACTERS = 64 << 10
_FAILURES = 3
_PAUSE_S = 30.0
_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"
"""`iw` is in /usr/sbin, which services and ordinary users do not have in their PATH."""


class Commands:
    """The tools of this device.

    Attributes:
        warnings: how often a source failed, was too slow or was not understood, by source.
        clock: for the pauses after failures.
    """

    def __init__(self, path: str | None = None, *, timeout_s: float = TIMEOUT_S, clock: Clock = SYSTEM_CLOCK) -> None:
        """Prepare to run tools.

        Args:
            path: folders to look in, in the format of PATH; by default PATH and the folders of system tools.
            timeout_s: deadline of each command.
        """
        self.clock = clock
        self.warnings: Counter[str] = Counter()
        self._path = path if path is not None else f"{os.environ.get('PATH', '')}:{_FOLDERS}"
        self._timeout_s = timeout_s
        self._found: dict[str, str | None] = {}
        self._failures: Counter[str] = Counter()
        self._not_before_s: dict[str, float] = {}

    def find(self, tool: str) -> str | None:
        """Path of a tool; None if it is not installed."""
        if tool not in self._found:
            self._found[tool] = shutil.which(tool, path=self._path)
        return self._found[tool]

    def ask(self, source: str, *command: str) -> str | None:
        """The output of a command; None if the tool is absent, fails or is too slow.

        Failures and timeouts are counted. After three in a row the source is not asked again for 30 s.

        Args:
            source: its name in `warnings`.
        """
        tool = self.find(command[0])
        if tool is None or self.clock.monotonic_s() < self._not_before_s.get(source, 0.0):
            return None
        try:
            done = subprocess.run(
                [tool, *command[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._timeout_s,
                check=False,
                env={"LC_ALL": "C", "PATH": self._path},
            )
        except (OSError, subprocess.TimeoutExpired):
            self._failed(source)
            return None
        if done.returncode != 0:
            self._failed(source)
            return None
        self._failures.pop(source, None)
        return done.stdout[:_MOST_CHARACTERS].decode(errors="replace")

    def facts(self, source: str, parse: Callable[[str], Parsed[_T]], nothing: _T, *command: str) -> _T:
        """The output of a command as `parse` understands it; `nothing` if there is no output."""
        text = self.ask(source, *command)
        return nothing if text is None else self.kept(source, parse(text))

    def kept(self, source: str, parsed: Parsed[_T]) -> _T:
        """The facts of a parsed output; a complaint is counted in `warnings`."""
        if parsed.complaint:
            self.warnings[source] += 1
        return parsed.facts

    def _failed(self, source: str) -> None:
        self.warnings[source] += 1
        self._failures[source] += 1
        if self._failures[source] >= _FAILURES:
            self._failures.pop(source)
            self._not_before_s[source] = self.clock.monotonic_s() + _PAUSE_S
