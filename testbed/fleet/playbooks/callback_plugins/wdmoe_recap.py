"""Ansible callback: writes the results of a run to the file in WDMOE_RECAP, for `wdmoe-testbed fleet`."""

import json
import os
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):  # type: ignore[misc] # Ansible has no types
    """Collects per host the counts, the tasks that changed something, and the last failure."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "wdmoe_recap"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._changed: dict[str, list[str]] = {}
        self._failed: dict[str, str] = {}

    def v2_runner_on_ok(self, result: Any) -> None:
        """Record a task that succeeded."""
        if result.is_changed():
            self._changed.setdefault(_host(result), []).append(_task(result))

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Record a task that failed."""
        if not ignore_errors:
            what = result._result
            message = what.get("msg") or ""
            detail = (what.get("stderr") or "").strip().splitlines()[-1:] + (what.get("last_words") or [])[-1:]
            # The last failure: if a rescue block fails too, its message includes the outcome of the rescue.
            self._failed[_host(result)] = f"{_task(result)}: {' — '.join([str(message), *detail])}"

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Record a host that can't be reached."""
        self._failed.setdefault(_host(result), str(result._result.get("msg", "unreachable")))

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Write the results at the end of the run."""
        path = os.environ.get("WDMOE_RECAP")
        if not path:
            return
        hosts = {
            host: {
                **stats.summarize(host),
                "changed_tasks": self._changed.get(host, []),
                "error": self._failed.get(host, ""),
            }
            for host in stats.processed
        }
        Path(path).write_text(json.dumps(hosts))


def _host(result: Any) -> str:
    return str(result._host.get_name())


def _task(result: Any) -> str:
    return str(result._task.get_name())
