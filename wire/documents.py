"""What the JSON documents that a node publishes about itself have in common. Pure."""

from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from wire.errors import FrameError

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A non-negative integer that fits into the 64 bits of tables; JSON itself has no limit."""


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
        node: the node that the topic belongs to; the document must name the same.
        what: the document's name in messages, and the reason of the error if it is not valid.
        most_bytes: longest payload to accept.
        schema: the version to accept.

    Raises:
        FrameError: with reason `length`, `what`, `version` or `node`: the payload is too long, not valid, of another
            schema, or about another node.
    """
    if len(payload) > most_bytes:
        raise FrameError("length", f"{what} of {len(payload)} bytes exceeds {most_bytes}")
    try:
        document = decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(what, f"not a {what} document: {error}") from None
    if document.schema != schema:
        raise FrameError("version", f"{what} schema {document.schema}, this side reads {schema}")
    if document.node != node:
        raise FrameError("node", f"{what} of '{document.node}' on the topic of '{node}'")
    return document
