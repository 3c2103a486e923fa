"""The manifest of a draft model, which the exporter makes and the base station loads to draft tokens."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from common.jsonl import decode_json
from wire.errors import BundleError
from wire.manifest import MAX_MANIFEST_BYTES, FileEntry, Positive, Quantisation, Sha256, verify_file

DRAFT_SCHEMA = 1
DRAFT_FOLDER = "draft"
"""Folder of the draft model in a bundle that has one."""
DRAFT_NAME = "draft.json"


class DraftManifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A folder with a single ONNX graph of a whole dense model.

    Attributes:
        source: name of the model that it was made from.
        source_sha256: hash of that model's config and weights.
        tokens_sha256: hash of its vocabulary, by the function of this name.
        vocab, layers, kv_heads, head_dim, max_positions: dimensions, as counts.
        files: the graph first, then its weights.
        tools: versions of the software that made it.
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
    """Hex SHA-256 of a vocabulary (token → id): equal for tokenizers that give every token the same id."""
    return hashlib.sha256(msgspec.json.encode(sorted((id, token) for token, id in ids.items()))).hexdigest()


def load_draft(folder: Path) -> DraftManifest:
    """Read the manifest of a draft model's folder, and check the hashes of its files.

    Raises:
        BundleError: there is no valid manifest, or a file is missing or changed.
    """
    path = folder / DRAFT_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB: not a draft model")
        draft = decode_json(path.read_bytes(), DraftManifest)
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is not a valid manifest of a draft model: {error}") from None
    if draft.schema != DRAFT_SCHEMA:
        raise BundleError(f"{path} has schema {draft.schema}, this version reads {DRAFT_SCHEMA}: export it again")
    for file in draft.files:
        verify_file(folder, file)
    return draft
