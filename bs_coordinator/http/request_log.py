"""A line for each request, for operators: who asked, how much, how long, with what result. Never the texts."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bs_coordinator.errors import ServeError
from bs_coordinator.http.openai_responses import new_id
from bs_coordinator.http.tally import Tally
from common.clock import Clock
from common.files import append_all

log = logging.getLogger(__name__)

LogLine = Callable[[dict[str, Any]], None]

_HUNG_UP = 499
"""Status of a request whose caller did not wait for the answer, as nginx writes it."""


class TrackedRequest:
    """What is known about one request while it is answered.

    Attributes:
        id: of the response.
        key: name of the caller's API key; empty without one.
        stream: whether the answer is streamed.
        choices: number of answers asked for.
        status: of the response, or of the error that ended its stream; 499 if the caller has hung up.
        tally: of its tokens.
        at_end: called when the response is complete.
    """

    def __init__(self, clock: Clock) -> None:
        self.id = new_id()
        self.key = ""
        self.stream = False
        self.choices = 0
        self.status = 0
        self.tally = Tally(clock)
        self.at_end: list[Callable[[], None]] = []

    def hung_up(self) -> None:
        """The caller does not wait for the rest."""
        self.status = _HUNG_UP

    def fail(self, status: int) -> None:
        """An error has ended the stream, whose response began with status 200."""
        if self.status != _HUNG_UP:
            self.status = status

    def line(self, path: str) -> dict[str, Any]:
        """The line of the log."""
        first_s = self.tally.first_token_s
        return {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "path": path,
            "key": self.key,
            "status": self.status,
            "stream": self.stream,
            "choices": self.choices,
            "prompt_tokens": self.tally.prompt_tokens,
            "completion_tokens": self.tally.new_tokens,
            "degraded_tokens": self.tally.degraded,
            "ttft_ms": None if first_s is None else round(1e3 * first_s, 1),
            "e2e_ms": round(1e3 * self.tally.elapsed_s, 1),
        }


class RequestTracking:
    """ASGI middleware: every POST has a `TrackedRequest` in its state, whose line is written when it is over."""

    def __init__(self, app: ASGIApp, *, clock: Clock, write: LogLine | None) -> None:
        """Wrap an application.

        Args:
            write: called with the line of each request; None for no log.
        """
        self._app = app
        self._clock = clock
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        tracked = TrackedRequest(self._clock)
        scope.setdefault("state", {})["tracked"] = tracked

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start" and not tracked.status:
                tracked.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except BaseException:
            tracked.status = tracked.status or 500
            raise
        finally:
            for call in tracked.at_end:
                call()
            if self._write is not None:
                self._write(tracked.line(scope["path"]))


@contextmanager
def request_log(path: Path) -> Iterator[LogLine]:
    """Append lines of JSON to a file, which only its owner can read if it is new.

    A line that can't be written is reported and left out: a full disk must not end answers.

    Raises:
        ServeError: the file can't be opened.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServeError(f"can't write the request log {path}: {error.strerror}: name another --request-log") from None

    def write(line: dict[str, Any]) -> None:
        try:
            append_all(fd, msgspec.json.encode(line) + b"\n")
        except OSError as error:
            log.warning("can't write the request log %s: %s", path, error.strerror)

    try:
        yield write
    finally:
        os.close(fd)
