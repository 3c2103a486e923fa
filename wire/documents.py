"""JSON documents that a node publishes of itself: what all of them have in common. Pure."""

from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from wire.errors import FrameError

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""JSON's integers have no end: what becomes a float or a table's 64 bits needs one."""


class _Document(Protocol):
    @property
    def schema(self) -> int: ...

    @property
    def node(self) -> str: ...


_D = TypeVar("_D", bound=_Document)


def decode_document(
    payload: bytes, node: str, decoder: msgspec.json.Decoder[_D], *, what: str, most_bytes: int, schema: int
) -> _D:
    """The document in `payload`, which arrived on a topic of `node`.

    Args:
        what: its name in errors, and the reason of one that is not valid.
        schema: the only one that this side reads.

    Raises:
        FrameError: with reason `length`, `what`, `version` or `node`: it is too long, not valid, of another schema, or
            speaks for another node.
    """
    if len(payload) > most_bytes:
        raise FrameError("length", f"{what} of {len(payload)} bytes exceeds {most_bytes}")
    try:
        document = decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FrameError(what, f"not a {what} document: {error}") from None
    if document.schema != schema:
        raise FrameError("version", f"{what} schema {document.schema}, this side reads {schema}")
    if document.node != node:
        raise FrameError("node", f"{what} speaks for '{document.node}' on the topic of '{node}'")
    return document
