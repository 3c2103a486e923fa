"""Metrics over HTTP: what the interface needs of their source, and the count of responses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bs_coordinator.http.observers import AnswerObserver

_OTHER_PATHS = "other"


class MetricsSource(AnswerObserver, ABC):
    """What metrics come from: it observes the answers, and counts the interface's responses."""

    @abstractmethod
    def responded(self, path: str, code: int) -> None:
        """A response has begun.

        Args:
            path: one of the interface's own, or `other`.
            code: its status code.
        """

    @abstractmethod
    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics as text.

        Args:
            accept: the request's Accept header.

        Returns:
            The body and its content type.
        """


def metrics_route(source: MetricsSource, check_key: Callable[[Request], None]) -> Route:
    """The path `/metrics`, for callers that `check_key` lets in: names and temperatures of devices are not for all."""

    async def metrics(request: Request) -> Response:
        check_key(request)
        body, content_type = source.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return Route("/metrics", metrics)


class CountResponses:
    """Middleware that reports each response's path and status code."""

    def __init__(self, app: ASGIApp, source: MetricsSource, paths: Collection[str]) -> None:
        """Wrap an application.

        Args:
            source: where responses are counted.
            paths: to tell apart. Callers choose what they ask for, so all others count as one.
        """
        self._app = app
        self._source = source
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"]
                self._source.responded(path if path in self._paths else _OTHER_PATHS, message["status"])
            await send(message)

        await self._app(scope, receive, send_and_count)
