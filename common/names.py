"""Names and addresses of hosts, checked once where they come in."""

import ipaddress
import re

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
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
    if labels[-1].isdigit():
        raise ValueError(f"{shown} is not an IPv4 address: it needs four numbers from 0 to 255 without leading zeros")
    return name


def _reason(text: str, error: UnicodeError) -> str:
    labels = text.removesuffix(".").split(".")
    if "" in labels:
        return "two dots follow each other, or it begins with one"
    if "too long" in str(error):
        return "a part between two dots is longer than 63 characters"
    return "it has characters that names can't have"
