"""Child processes whose output is parsed: they run in the C locale, in which formats are the same everywhere."""

import os
import subprocess
from collections.abc import Sequence


def c_locale() -> dict[str, str]:
    """The environment of this process with the C locale: no translated words, no decimal commas."""
    return {**os.environ, "LC_ALL": "C"}


def run_parsed(argv: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command in the C locale, without input; bytes of its output that are not UTF-8 are replaced.

    Raises:
        OSError: it can't be started.
        subprocess.TimeoutExpired: it took more than `timeout_s`, and was ended.
    """
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout_s,
        check=False, env=c_locale(),
    )  # fmt: skip
