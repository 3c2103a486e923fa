"""Asking the system's own tools, with a deadline, and not again and again when that is in vain."""

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from edge_node.telemetry.parsed import Parsed

_T = TypeVar("_T")

TIMEOUT_S = 0.5
_MOST_CHARACTERS = 64 << 10
_FAILURES = 3
_PAUSE_S = 30.0
_FOLDERS = "/usr/sbin:/sbin:/usr/bin:/bin"
"""`iw` lies in /usr/sbin, which services and ordinary users don't have in their PATH."""


class Commands:
    """The tools of this device.

    Attributes:
        warnings: outputs that did not come or were not understood, by source.
    """

    def __init__(self, path: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        """Look for tools.

        Args:
            path: folders to look in, like PATH; the system's by default.
        """
        self.warnings: Counter[str] = Counter()
        self._path = path if path is not None else f"{os.environ.get('PATH', '')}:{_FOLDERS}"
        self._timeout_s = timeout_s
        self._found: dict[str, str | None] = {}
        self._failures: Counter[str] = Counter()
        self._not_before_s: dict[str, float] = {}

    def find(self, tool: str) -> str | None:
        """Where a tool lies; None where there is none."""
        if tool not in self._found:
            self._found[tool] = shutil.which(tool, path=self._path)
        return self._found[tool]

    def ask(self, source: str, *command: str) -> str | None:
        """What a command prints; None where the tool is absent, fails or is too slow.

        The latter two are counted, and who does it three times running is left alone for a while.

        Args:
            source: what to call it in the warnings.
        """
        tool = self.find(command[0])
        if tool is None or time.monotonic() < self._not_before_s.get(source, 0.0):
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
        """What a command says, as `parse` understands it; `nothing` where it says nothing."""
        text = self.ask(source, *command)
        return nothing if text is None else self.kept(source, parse(text))

    def kept(self, source: str, parsed: Parsed[_T]) -> _T:
        """The facts; what was complained of is counted."""
        if parsed.complaint:
            self.warnings[source] += 1
        return parsed.facts

    def _failed(self, source: str) -> None:
        self.warnings[source] += 1
        self._failures[source] += 1
        if self._failures[source] >= _FAILURES:
            self._failures.pop(source)
            self._not_before_s[source] = time.monotonic() + _PAUSE_S
