"""Names and addresses of hosts, and origins of web pages, checked once where they come in."""

import ipaddress
import re
from collections.abc import Iterable

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][\w+.-]*)://(?P<host>[^\s/?#@:\[\]]+|\[[\da-f:.]+\])(?P<port>(?::[1-9]\d{0,4})?)", re.A | re.I
)
_OWN_PORTS = (("http", ":80"), ("https", ":443"))
_MOST_HOST = 253
_EXAMPLE = "write for example 192.168.1.10 or broker.local"


def check_host(text: str) -> str:
    """A host's name or address in the form in which certificates and name servers know it.

    Names are in lower case, without the dot that may end them, and other letters than ASCII's are encoded by IDNA
    (RFC 3490): `müller.local` becomes `xn--mller-kva.local`. Addresses are IPv4 with four numbers, or IPv6 without
    brackets; an IPv6 address may have a zone, such as `fe80::1%eth0`.

    Raises:
        ValueError: `text` is none of these. The message repeats nothing of a text that may be a URL with a password.
    """
    if "/" in text or "@" in text:
        raise ValueError(f"a URL is not a host: give its name or address alone; {_EXAMPLE}")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    shown = repr(text[:80])
    if not text:
        raise ValueError(f"an empty text is not a host: {_EXAMPLE}")
    if text[0] == "[" and text[-1] == "]":
        raise ValueError(f"{shown} is not a host: write an IPv6 address without brackets")
    if ":" in text:
        raise ValueError("neither a host nor an IPv6 address: give the host alone, without a port")
    try:
        name = text.removesuffix(".").encode("idna").decode("ascii").lower()
    except UnicodeError as error:
        raise ValueError(f"{shown} is not a host: {_reason(text, error)}; {_EXAMPLE}") from None
    labels = name.split(".")
    if wrong := [label for label in labels if not _LABEL.fullmatch(label)]:
        raise ValueError(f"{shown} is not a host: {wrong[0][:63]!r} is not a valid part of a name; {_EXAMPLE}")
    if len(name) > _MOST_HOST:
        raise ValueError(f"{shown} is not a host: it has more than {_MOST_HOST} characters")
    if re.fullmatch(r"\d+|0x[\da-f]*", labels[-1]):  # name servers take all of these for numbers
        raise ValueError(f"{shown} is not an IPv4 address: it needs four numbers from 0 to 255 without leading zeros")
    for label in labels:
        try:
            label.encode().decode("idna")
        except UnicodeError:
            raise ValueError(f"{shown} is not a host: {label!r} is not the encoded form of a name") from None
    return name


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that an earlier one equals but for upper and lower case; None if all differ.

    For names that become names of files: some file systems do not tell upper and lower case apart.
    """
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            return name
        seen.add(name.lower())
    return None


def check_origin(text: str) -> None:
    """Check that browsers would write an origin of web pages in this way (RFC 6454, section 6.2).

    Raises:
        ValueError: they would not. The message shows nothing of a text that may be a URL with a password.
    """
    found = _ORIGIN.fullmatch(text)
    if found is None or int(found["port"][1:] or 0) > 65535:
        raise ValueError(
            "not the origin of web pages: give scheme and host, and the port unless it is the scheme's own, such as "
            "https://chat.example or http://192.168.1.10:3000"
        )
    host = check_host(found["host"].strip("[]"))
    port = "" if (found["scheme"].lower(), found["port"]) in _OWN_PORTS else found["port"]
    origin = f"{found['scheme'].lower()}://{f'[{host}]' if ':' in host else host}{port}"
    if origin != text:
        raise ValueError(f"browsers write this origin in another way: {origin}")


def _reason(text: str, error: UnicodeError) -> str:
    labels = text.removesuffix(".").split(".")
    if "" in labels:
        return "two dots follow each other, or it begins with one"
    if "too long" in str(error):
        return "a part between two dots is longer than 63 characters"
    return "it has characters that names can't have"
