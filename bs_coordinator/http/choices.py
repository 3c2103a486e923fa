"""The answers to one HTTP request: one for each choice of each of its prompts, generated side by side."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request

from bs_coordinator.config import SamplingConfig
from bs_coordinator.engine.logprobs import TokenLogprob
from bs_coordinator.errors import AnswerError, BusyError, ContextLengthError
from bs_coordinator.http import requests
from bs_coordinator.http.answer_server import AnswerServer
from bs_coordinator.http.openai_responses import Token
from bs_coordinator.http.requests import SharedPrompt, StreamUpdate
from bs_coordinator.http.stop_strings import StopText
from bs_coordinator.selection import Policy
from common.errors import WdmoeError

HUNG_UP = "the caller has hung up"


class Choice(NamedTuple):
    """One answer to generate.

    Attributes:
        prompt: index of the prompt among those of the HTTP request.
        sampling: how to choose its tokens.
        policy: chooses its experts; None for the base station's own.
        timed: its tokens have the parts of their times.
    """

    prompt: int
    sampling: SamplingConfig
    policy: Policy | None = None
    timed: bool = False


class Choices:
    """The choices of one HTTP request, of which at most as many are generated at once as the server steps together.

    The first choice takes a place of the server; others take places for which no caller waits. A choice that ends
    passes its place on to the next one. So a caller with many prompts finds room whenever a caller with one does.

    The first choice of a prompt computes it. Its others begin once that one has had a token, from a copy of its KV
    cache.
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
        self._left = list(range(len(choices)))
        self._first: dict[int, int] = {}
        """The first choice of each prompt."""
        for index, choice in enumerate(choices):
            self._first.setdefault(choice.prompt, index)
        several = len(choices) > len(self._first)
        self._shared = {prompt: SharedPrompt() for prompt in self._first} if several else {}
        self._computed: dict[int, tuple[TokenLogprob, ...]] = {}
        """Log-probabilities of the tokens of each shared prompt that has been computed; empty if not asked for."""
        self._scores: dict[int, tuple[TokenLogprob, ...]] = {}
        """The same for choices that have had no token yet and did not compute their prompt."""
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
            self._accept(0)
        except BusyError as error:
            raise HTTPException(429, str(error), {"Retry-After": f"{error.retry_after_s:.0f}"}) from None
        # Referred to by the request, because a task without a reference may be garbage-collected.
        self._request.state.cancel_on_disconnect = asyncio.create_task(self._cancel_on_disconnect())
        try:
            self._prompts = await tokenise()
        except BaseException:
            self._cancel_all()
            raise
        self._submit(0)
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
                        yield index, self._finish(index, self._share_prompt(index, token))
        except asyncio.CancelledError:  # by Starlette, if it notices first
            self._on_hang_up()
            raise
        finally:
            self._cancel_all()

    @property
    def ahead(self) -> int:
        """How many requests of others, or earlier ones, have to end before the first unfinished choice is answered."""
        return min((self._server.ahead(request) for request in self._live.values()), default=0)

    def _share_prompt(self, index: int, token: Token) -> Token:
        """The token with its prompt's scores; a prompt's first token lets its other choices begin."""
        prompt = self._choices[index].prompt
        if prompt in self._shared and prompt not in self._computed:
            self._computed[prompt] = token.prompt
            self._take_free_places()
        return token._replace(prompt=self._scores.pop(index)) if index in self._scores else token

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
        if (following := self._next()) is not None:
            try:
                self._accept(following, successor=True)
            except BusyError as error:  # the server is being stopped
                raise _http_exception(error) from None
            self._submit(following)
            self._take_free_places()
        return token

    def _next(self) -> int | None:
        """The first choice left that can begin: the first of a prompt, or one whose prompt has been computed.

        Of a prompt that is being computed, the first choice is running: others follow when it has had a token.
        """
        prompts = ((index, self._choices[index].prompt) for index in self._left)
        return next((i for i, prompt in prompts if self._first[prompt] == i or prompt in self._computed), None)

    def _take_free_places(self) -> None:
        # Choices of ours that have just ended pass their places on when their last tokens are taken.
        with contextlib.suppress(BusyError):  # another caller was faster
            while (
                (following := self._next()) is not None
                and len(self._live) < self._server.most_at_once
                and self._server.free_places
            ):
                self._accept(following)
                self._submit(following)

    def _accept(self, index: int, *, successor: bool = False) -> None:
        """Take a place for a choice."""
        choice = self._choices[index]

        def deliver(update: StreamUpdate) -> None:
            item = (
                _http_exception(update.error)
                if update.error
                else [Token.of(event, timed=choice.timed) for event in update.events]
            )
            with contextlib.suppress(RuntimeError):  # the loop is closed: the caller is gone
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, item))

        prompt, sampling = choice.prompt, choice.sampling
        more: dict[str, Any] = {"successor": True} if successor else {}
        more |= {"trace": self._trace} if self._trace.traceparent else {}
        more |= {"policy": choice.policy} if choice.policy else {}
        if prompt in self._shared:
            more["shared"] = self._shared[prompt]
        computed = self._computed.get(prompt)
        if computed is not None:
            sampling = replace(sampling, prompt_logprobs=False)
        self._live[index] = self._server.accept(sampling, deliver, same_text=self._same_text, **more)
        self._left.remove(index)
        if computed is not None:
            self._scores[index] = computed

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
