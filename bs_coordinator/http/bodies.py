"""Bodies of requests: read within limits, then checked."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from bs_coordinator.http.choices import HUNG_UP

MAX_BODY_BYTES = 1 << 20
_BODY_S = 30
"""A request's body has to arrive within this time."""

_Options = TypeVar("_Options")


async def read_body(request: Request, parse: Callable[[bytes], _Options]) -> _Options:
    """What `parse` makes of a request's body.

    Args:
        parse: raises ValueError, whose message the caller gets.

    Raises:
        HTTPException: the body is too long, takes too long to arrive, or is not what it should be.
    """
    # Browsers send this type to another origin only after they have asked (CORS).
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send the request with the header Content-Type: application/json")
    if (encoding := request.headers.get("content-encoding", "").strip().lower()) not in ("", "identity"):
        raise HTTPException(415, f"send the request without Content-Encoding: '{encoding[:40]}' is not decoded here")
    raw = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                raw += part
                if len(raw) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"the request is longer than {MAX_BODY_BYTES} bytes")
        return parse(bytes(raw))
    except TimeoutError:
        raise HTTPException(408, f"the request took longer than {_BODY_S} s to arrive") from None
    except ClientDisconnect:
        raise HTTPException(400, HUNG_UP) from None
    except ValueError as error:
        raise HTTPException(400, f"not a request that can be answered: {error}") from None
