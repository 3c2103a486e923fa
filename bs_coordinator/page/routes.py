"""The routes of the live page: its files, and its feed."""

from collections.abc import Callable
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bs_coordinator.page.feed import LiveFeed, Viewer

SECURITY_HEADERS = {
    # Nothing but the page's own files and the server's own addresses; no inline scripts or styles.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_RETRY_AFTER_S = 10


def page_routes(feed: LiveFeed, check_key: Callable[[Request], None]) -> list[Route]:
    """The page at `/`, its files below `/live/`, and its feed at `/live/events`.

    Args:
        feed: of the snapshots.
        check_key: raises HTTPException for a request without a valid API key. It is asked for the feed only: the
            page's files hold no data, and the page has to be loaded before a key can be typed in.
    """
    static = {file.name: file.read_bytes() for file in files("bs_coordinator.page").joinpath("static").iterdir()}

    def respond(name: str) -> Response:
        kind = _TYPES.get(name[name.rfind(".") :])
        if name not in static or kind is None:
            raise HTTPException(404, f"the live page has no file '{name}'")
        headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache"}
        return Response(static[name], media_type=kind, headers=headers)

    async def page(request: Request) -> Response:
        return respond("index.html")

    async def asset(request: Request) -> Response:
        return respond(request.path_params["name"])

    async def events(request: Request) -> Response:
        check_key(request)
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        viewer = feed.join()
        if viewer is None:
            raise HTTPException(
                503, "too many live pages are open: close one", {"Retry-After": str(_RETRY_AFTER_S)}
            )  # fmt: skip
        return _EventStream(feed, viewer)

    return [Route("/", page), Route("/live/events", events), Route("/live/{name}", asset)]


class _EventStream(StreamingResponse):
    """A viewer's events; the viewer leaves when the stream ends for whatever reason."""

    def __init__(self, feed: LiveFeed, viewer: Viewer) -> None:
        super().__init__(
            feed.events(viewer), media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Accel-Buffering": "no"},
        )  # fmt: skip
        self._feed = feed
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._viewer)
