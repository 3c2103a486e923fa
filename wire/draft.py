"""A draft model's document: what the exporter makes and the base station loads to guess tokens with."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from wire.errors import BundleError
from wire.manifest import MAX_MANIFEST_BYTES, FileEntry, Positive, Quantisation, Sha256, verify_file

DRAFT_SCHEMA = 1
DRAFT_FOLDER = "draft"
"""Of a bundle that brings one."""
DRAFT_NAME = "draft.json"


class DraftManifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A folder with one graph of a whole dense model (`exporter.draft.draft_graph`).

    Attributes:
        source: the model's own name.
        source_sha256: see `exporter.demo_model.base.fingerprint`.
        tokens_sha256: see `tokens_sha256`.
        vocab, layers, kv_heads, head_dim, max_positions: dimensions, as counts.
        files: the graph first, then its weights.
        tools: versions of what made it.
    """

    schema: int
    source: str
    source_sha256: Sha256
    quantisation: Quantisation
    tokens_sha256: Sha256
    vocab: Positive
    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    max_positions: Positive
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1)]
    tools: dict[str, str]


def tokens_sha256(ids: Mapping[str, int]) -> str:
    """Equal for tokenizers that give every token the same id."""
    return hashlib.sha256(msgspec.json.encode(sorted((id, token) for token, id in ids.items()))).hexdigest()


def load_draft(folder: Path) -> DraftManifest:
    """Read the document of a draft model, and check it and its files.

    Raises:
        BundleError: it is not one, or damaged.
    """
    path = folder / DRAFT_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB: not a draft model's document")
        draft = msgspec.json.decode(path.read_bytes(), type=DraftManifest)
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a valid draft model's document: {error}") from None
    if draft.schema != DRAFT_SCHEMA:
        raise BundleError(f"{path} has schema {draft.schema}, this version reads {DRAFT_SCHEMA}: export it again")
    for file in draft.files:
        verify_file(folder, file)
    return draft
