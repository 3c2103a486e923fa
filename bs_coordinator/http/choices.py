"""The answers to one HTTP request: one for each choice of each of its prompts, generated side by side."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request

from bs_coordinator.config import SamplingConfig
from bs_coordinator.errors import AnswerError, BusyError, ContextLengthError
from bs_coordinator.http import requests
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.openai_responses import Token
from bs_coordinator.http.requests import StreamUpdate
from bs_coordinator.http.stop_strings import StopText
from common.errors import WdmoeError

HUNG_UP = "the caller has hung up"


class Choice(NamedTuple):
    """One answer to generate.

    Attributes:
        prompt: index of the prompt among those of the HTTP request.
        sampling: how to choose its tokens.
    """

    prompt: int
    sampling: SamplingConfig


class Choices:
    """The choices of one HTTP request, of which at most as many are generated at once as the server steps together.

    The first takes a place of the server, and others take those that nobody waits for; each that ends passes its place
    on to the next one. A caller with many prompts thereby finds room whenever a caller with one does.
    """

    def __init__(
        self, server: AnswerServer, request: Request, choices: Sequence[Choice], new_text: Callable[[], StopText], *,
        same_text: bool, keep_alive_s: float, on_hang_up: Callable[[], None],
    ) -> None:  # fmt: skip
        """Nothing is accepted yet.

        Args:
            request: whose disconnection ends the answers.
            choices: in the order of their indices.
            new_text: a text that ends at the caller's stop strings, for each choice.
            same_text: the answers continue their prompts' texts.
            keep_alive_s: how long nothing may come from the server before `tokens` yields None.
            on_hang_up: called when the caller does not wait for the answers.
        """
        self._server = server
        self._request = request
        self._choices = choices
        self._same_text = same_text
        self._keep_alive_s = keep_alive_s
        self._on_hang_up = on_hang_up
        self._texts = [new_text() for _ in choices]
        self._left = deque(range(len(choices)))
        self._live: dict[int, requests.Request] = {}
        self._arrived: asyncio.Queue[tuple[int, list[Token] | HTTPException]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._prompts: list[list[int]] = []
        headers = request.headers
        self._trace = requests.TraceHeaders(headers.get("traceparent", ""), headers.get("tracestate", ""))

    async def start(self, tokenise: Callable[[], Awaitable[list[list[int]]]]) -> list[list[int]]:
        """Take a place, tokenise the prompts and begin the answers.

        Returns:
            The prompts' token ids.

        Raises:
            HTTPException: the server is full, or a prompt can't be tokenised.
        """
        try:
            first = self._accept()
        except BusyError as error:
            raise HTTPException(429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}) from None
        # Referred to by the request, because a task without a reference may be garbage-collected.
        self._request.state.cancel_on_disconnect = asyncio.create_task(self._cancel_on_disconnect())
        try:
            self._prompts = await tokenise()
        except BaseException:
            self._cancel_all()
            raise
        self._submit(first)
        self._take_free_places()
        return self._prompts

    async def tokens(self) -> AsyncIterator[tuple[int, Token] | None]:
        """Each choice's index and next token as they come, the last of each choice with `finish`.

        None is a sign of life: nothing has come for `keep_alive_s`.

        Raises:
            HTTPException: an answer failed, or the caller has hung up.
        """
        try:
            while self._live:
                try:
                    async with asyncio.timeout(self._keep_alive_s):
                        index, item = await self._arrived.get()
                except TimeoutError:
                    yield None
                    continue
                if isinstance(item, HTTPException):
                    raise item
                for token in item:
                    # Tokens may have been on their way when the answer was ended by a stop string.
                    if index in self._live:
                        yield index, self._finish(index, token)
        except asyncio.CancelledError:  # by Starlette, if it notices first
            self._on_hang_up()
            raise
        finally:
            self._cancel_all()

    @property
    def ahead(self) -> int:
        """How many requests of others, or earlier ones, have to end before the first unfinished choice is answered."""
        return min((self._server.ahead(request) for request in self._live.values()), default=0)

    def _finish(self, index: int, token: Token) -> Token:
        """The token with the text that is certain to be no part of a stop string; ends the choice if it is the last."""
        text = self._texts[index]
        certain = text.push(token.text, token.id)
        if text.hit:
            self._server.cancel(self._live[index])
            token = token._replace(text=certain, finish="stop")
        elif token.finish:
            token = token._replace(text=certain + text.rest())
        else:
            return token._replace(text=certain)
        del self._live[index]
        if self._left:
            try:
                self._submit(self._accept(successor=True))
            except BusyError as error:  # the server is being stopped
                raise _http_exception(error) from None
            self._take_free_places()
        return token

    def _take_free_places(self) -> None:
        with contextlib.suppress(BusyError):  # another caller was faster
            while self._left and self._server.free_places:
                self._submit(self._accept())

    def _accept(self, *, successor: bool = False) -> int:
        """Take a place for the next choice; returns its index."""
        index = self._left[0]

        def deliver(update: StreamUpdate) -> None:
            item = _http_exception(update.error) if update.error else [Token.of(event) for event in update.events]
            with contextlib.suppress(RuntimeError):  # the loop is closed: the caller is gone
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, item))

        more: dict[str, Any] = {"successor": True} if successor else {}
        more |= {"trace": self._trace} if self._trace.traceparent else {}
        sampling = self._choices[index].sampling
        self._live[index] = self._server.accept(sampling, deliver, same_text=self._same_text, **more)
        return self._left.popleft()

    def _submit(self, index: int) -> None:
        self._server.submit(self._live[index], self._prompts[self._choices[index].prompt])

    def _cancel_all(self) -> None:
        self._left.clear()
        for request in self._live.values():
            self._server.cancel(request)

    async def _cancel_on_disconnect(self) -> None:
        # ASGI sends this message when the caller hangs up, and after the response, when nothing is left to cancel.
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        if self._live or self._left:
            self._on_hang_up()
        self._cancel_all()
        self._arrived.put_nowait((-1, HTTPException(400, HUNG_UP)))


def _http_exception(error: WdmoeError) -> HTTPException:
    status = 400 if isinstance(error, ContextLengthError) else 500 if isinstance(error, AnswerError) else 503
    return HTTPException(status, str(error))
