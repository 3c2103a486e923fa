"""Chat templates are programs of the checkpoint's: they run in processes that end when they take too much.

Run as a program, this module is such a process. It knows transformers' template functions, but not torch (60 MiB).
"""

import atexit
import json
import multiprocessing
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

CPU_S = 1
"""Processor time for one conversation, which takes milliseconds (1 MB of text: 0.1 s). Unlike a deadline it does not
depend on how busy the machine is."""
_START_S = 120.0
"""Deadline for a process to import its libraries, which takes half a second on a PC."""
_ANSWER_S = 60.0
"""Deadline for a process that gets no processor time."""
MOST_AT_ONCE = 3
"""Conversations rendered at once: fewer than the threads that tokenise, so that those of other requests stay free."""
_MEMORY_BYTES = 1 << 30
_SPARE_CHARACTERS = 1 << 16
_MOST_GROWTH = 4
"""Text that a template may write: so many times the length of the messages in JSON, plus `_SPARE_CHARACTERS`."""


class TemplateFailedError(Exception):
    """A template raised an exception, whose message this is."""


class TemplateEndedError(Exception):
    """A template was ended; the message says why."""


class TemplateProcesses:
    """The processes that render: one is kept, and up to `MOST_AT_ONCE` run while several callers wait."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._lock = threading.Lock()
        self._idle: _Process | None = None

    def start(self) -> None:
        """Start a process if there is none, without waiting until it is ready."""
        with self._lock:
            self._idle = self._idle or _Process()

    def render(self, template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
        """What a chat template writes for a conversation, up to the start of the assistant's next message.

        Args:
            template: in Jinja.
            messages: of the conversation.
            variables: that the template may use, such as `bos_token`.

        Raises:
            TemplateFailedError: the template raised an exception.
            TemplateEndedError: it took too much time or memory, or wrote too much.
        """
        with self._places:
            with self._lock:
                process, self._idle = self._idle, None
            if process is None or process.ended:
                process = _Process()
            try:
                reply = process.ask({"template": template, "messages": messages, "variables": variables})
            except BaseException:
                process.end()
                raise
            with self._lock:
                spare, self._idle = self._idle, process
            if spare is not None:
                spare.end()
        if "failed" in reply:
            raise TemplateFailedError(reply["failed"])
        return reply["text"]

    def close(self) -> None:
        """End the process that is kept."""
        with self._lock:
            process, self._idle = self._idle, None
        if process is not None:
            process.end()


PROCESSES = TemplateProcesses()
"""Of this process: all tokenizers share them."""
atexit.register(PROCESSES.close)


class _Process:
    def __init__(self) -> None:
        self._ready = False
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the base station
            )  # fmt: skip

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        try:
            if not self._ready:
                self._receive(_START_S, "the process for chat templates does not start")
                self._ready = True
            self._pipe.send_bytes(json.dumps(request).encode())
            reply: dict[str, str] = json.loads(self._receive(_ANSWER_S, f"it does not end within {_ANSWER_S:.0f} s"))
        except (EOFError, OSError):
            raise TemplateEndedError(
                f"it takes more than {CPU_S} s of processor time or {_MEMORY_BYTES >> 30} GiB of memory"
            ) from None
        return reply

    def _receive(self, timeout_s: float, why_not: str) -> bytes:
        if not self._pipe.poll(timeout_s):
            raise TemplateEndedError(why_not)
        return self._pipe.recv_bytes()

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def _serve(pipe: Connection) -> None:
    """Render until the other end is closed."""
    from transformers.utils.chat_template_utils import render_jinja_template

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        # The soft limit sends SIGXCPU, which ends this process; it counts in whole seconds.
        limit_s = int(time.process_time()) + 1 + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        reply = json.dumps(_render(render_jinja_template, **json.loads(request))).encode()
        pipe.send_bytes(reply)


def _render(
    render: Callable[..., Any], template: str, messages: list[dict[str, str]], variables: dict[str, Any]
) -> dict[str, str]:
    try:
        (text,), _ = render([messages], chat_template=template, add_generation_prompt=True, **variables)
    except Exception as error:  # noqa: BLE001 - a template is a program, which raises anything
        return {"failed": str(error)[:_SPARE_CHARACTERS] or type(error).__name__}
    most = _SPARE_CHARACTERS + _MOST_GROWTH * len(json.dumps(messages, ensure_ascii=False))
    return {"text": text} if len(text) <= most else {"failed": f"it writes {len(text)} characters"}


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
