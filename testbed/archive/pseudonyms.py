"""Replaces names and addresses that reveal devices, networks or people by pseudonyms that can't be reversed. Pure.

A pseudonym is a truncated HMAC-SHA256 of the value under the operator's key. Equal values get equal pseudonyms in all
archives of one operator, and guesses can't be checked without the key.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import Any, Literal

Kind = Literal["ssid", "mac", "ip", "host", "user"]
_DIGITS = 8
_MAC = re.compile(r"(?<![\w:-])(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![\w:-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:%\w+)?(?![\w:])")
_URL = re.compile(r"(\w+://)(?:([^\s/@:\"']+)(?::[^\s\"']*)?@)?([A-Za-z0-9][\w.-]*)?")
"""A URL up to its host; a password, which ours never have, is left out."""
_HOME = re.compile(r"(/(?:home|Users)/)([^/\s\"':,;]+)")
_LOCAL = re.compile(r"(?<![\w.-])[A-Za-z0-9][\w-]*(?:\.[\w-]+)*\.(?:local|lan|home|internal|fritz\.box)(?![\w-])")
_HARMLESS = frozenset({"localhost", "root", "embedded", "mosquitto", "bs"})
"""Names that reveal nothing."""
_SHORTEST = 2


class Pseudonyms:
    """The pseudonyms of one operator."""

    def __init__(self, key: bytes, *, keep: Iterable[str] = ()) -> None:
        """Begin without known values.

        Args:
            key: the operator's key, at least 32 bytes.
            keep: words that are never replaced, such as node ids, which the plan needs.
        """
        self._key = key
        self._keep = {*keep, *_HARMLESS}
        self._names: dict[tuple[Kind, str], str] = {}
        self._known: dict[str, Kind] = {}
        self._words: re.Pattern[str] | None = None

    @property
    def replaced(self) -> dict[Kind, int]:
        """Number of different values that have got a pseudonym, by kind."""
        kinds: tuple[Kind, ...] = ("ssid", "mac", "ip", "host", "user")
        return {kind: sum(k == kind for k, _ in self._names) for kind in kinds}

    def learn(self, kind: Kind, values: Iterable[str]) -> None:
        """Replace these values from now on, wherever they are whole words."""
        new = {v: kind for v in values if len(v) >= _SHORTEST and v not in self._keep and not v.isdigit()}
        self._known |= new
        if new:
            longest_first = sorted(self._known, key=len, reverse=True)
            self._words = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")

    def name(self, kind: Kind, value: str) -> str:
        """The pseudonym of one value."""
        if value in self._keep:
            return value
        # Host names, user names and MAC addresses are case-insensitive, network names are not.
        same = value if kind == "ssid" else value.lower().replace("-", ":") if kind == "mac" else value.lower()
        if (kind, same) not in self._names:
            digest = hmac.new(self._key, f"{kind}\0{same}".encode(), hashlib.sha256).hexdigest()
            self._names[kind, same] = f"{kind}-{digest[:_DIGITS]}"
        return self._names[kind, same]

    def text(self, text: str) -> str:
        """The text with pseudonyms for all addresses and learnt values."""
        text = _URL.sub(self._url, text)
        text = _HOME.sub(lambda m: m[1] + self.name("user", m[2]), text)
        text = _MAC.sub(lambda m: self.name("mac", m[0]), text)
        text = _IPV6.sub(lambda m: self._address(m[0]), text)
        text = _IPV4.sub(lambda m: self._address(m[0]), text)
        text = _LOCAL.sub(lambda m: self.name("host", m[0]), text)
        if self._words is not None:
            text = self._words.sub(lambda m: self.name(self._known[m[0]], m[0]), text)
        return text

    def tree(self, value: Any) -> Any:
        """A JSON document with pseudonyms in all of its texts, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(k): self.tree(v) for k, v in value.items()}
        return [self.tree(v) for v in value] if isinstance(value, list) else value

    def _url(self, match: re.Match[str]) -> str:
        scheme, user, host = match[1], match[2], match[3] or ""
        if scheme in ("file://", "http://", "https://") and user is None:
            return match[0]
        who = f"{self.name('user', user)}@" if user else ""
        if not host or _is_address(host):
            return scheme + who + host  # all addresses are replaced later
        return scheme + who + self.name("host", host)

    def _address(self, text: str) -> str:
        try:
            address = ipaddress.ip_address(text.partition("%")[0])
        except ValueError:
            return text
        if address.is_loopback or address.is_unspecified:
            return text
        return self.name("ip", str(address))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def texts_under(key: str, value: object) -> Iterable[str]:
    """All texts under a key, anywhere in a JSON document."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                yield inner
            yield from texts_under(key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_under(key, inner)
