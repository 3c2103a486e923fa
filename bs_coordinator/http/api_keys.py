"""Which callers are let in, by their API keys, and how many requests each key has. Used by one thread."""

from collections import Counter
from collections.abc import Iterable
from hmac import compare_digest

from starlette.exceptions import HTTPException

from bs_coordinator.http.access import ApiKey

_RETRY_S = 1


class KeyRing:
    """The keys of all callers, and how many requests of each are being answered."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        """Without keys every caller is let in, without a name."""
        self._keys = list(keys)
        self._running: Counter[str] = Counter()

    @property
    def needed(self) -> bool:
        """Whether callers must send a key."""
        return bool(self._keys)

    def check(self, authorization: str) -> str:
        """The name of the key in an Authorization header; empty if none is needed.

        The scheme's name is case-insensitive (RFC 9110, 11.1); some clients send the key without one.

        Raises:
            HTTPException: 401, because the key is missing or wrong.
        """
        scheme, _, rest = authorization.partition(" ")
        sent = rest.strip() if scheme.lower() == "bearer" else authorization
        # All are compared, so that the time tells nothing.
        names = [key.name for key in self._keys if compare_digest(sent.encode(), key.key.encode())]
        if self._keys and not names:
            raise HTTPException(
                401, "a valid API key is needed: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"}
            )
        return names[0] if names else ""

    def enter(self, name: str) -> None:
        """Count a request of a key; `leave` must follow.

        Raises:
            HTTPException: 429, because the key has as many requests as it may have.
        """
        most = next((key.most_requests for key in self._keys if key.name == name), None)
        if most is not None and self._running[name] >= most:
            raise HTTPException(
                429, f"the API key '{name}' has {most} requests already, its limit: retry when one is answered",
                {"Retry-After": str(_RETRY_S)},
            )  # fmt: skip
        self._running[name] += 1

    def leave(self, name: str) -> None:
        """The request of a key is over."""
        self._running[name] -= 1
