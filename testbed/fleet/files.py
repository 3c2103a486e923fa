"""Which files of a bundle a machine needs. Pure but for reading the manifest."""

import hashlib
from pathlib import Path

from msgspec import Struct

from wire.experts import parse_selector
from wire.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest, load_manifest


class Needed(Struct, frozen=True):
    """What a machine's bundle folder must hold.

    Attributes:
        files: experts or trunk first, the manifest last: a folder with a manifest is complete.
        bytes: of all of them.
        model_sha256: which model, whatever its quantisation.
    """

    files: list[FileEntry]
    bytes: int
    model_sha256: str


def needed_files(bundle: Path, *, experts: str | None, trunk: bool) -> Needed:
    """The files of `bundle` for a node (its experts) or a base station (the trunk, and a draft model if there is one).

    Raises:
        BundleError: it is no bundle, or was exported without one of the experts.
        ValueError: `experts` is no selector for this model.
    """
    manifest = load_manifest(bundle)
    files = [*manifest.trunk, *manifest.draft] if trunk else []
    if experts is not None:
        files += expert_files(manifest, experts)
    files += [_entry(bundle, name) for name in (SIGNATURE_NAME, MANIFEST_NAME) if (bundle / name).is_file()]
    return Needed(files, sum(file.bytes for file in files), manifest.model_sha256)


def expert_files(manifest: Manifest, selector: str) -> list[FileEntry]:
    """Of the experts that a selector names.

    Raises:
        BundleError: the bundle lacks one.
        ValueError: the selector is wrong.
    """
    ids = parse_selector(selector, layers=manifest.dims.layers, experts=manifest.dims.experts)
    return [file for entry in manifest.entries(ids) for file in entry.files]


def _entry(bundle: Path, name: str) -> FileEntry:
    raw = (bundle / name).read_bytes()
    return FileEntry(path=name, bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
