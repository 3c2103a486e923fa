"""The files of a bundle that a machine needs. Pure, except for reading the manifest."""

import hashlib
from pathlib import Path

from msgspec import Struct

from wire.experts import parse_selector
from wire.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest, load_manifest


class Needed(Struct, frozen=True):
    """Files that a machine's bundle folder must contain.

    Attributes:
        files: experts or trunk first, the manifest last, so a folder with a manifest is complete.
        bytes: total size.
        model_sha256: identifies the model, independent of its quantisation.
    """

    files: list[FileEntry]
    bytes: int
    model_sha256: str


def needed_files(bundle: Path, *, experts: str | None, trunk: bool) -> Needed:
    """The files of `bundle` for a node (its experts) or a base station (the trunk, and the draft model if any).

    Args:
        experts: selector of the node's experts; None for no experts.
        trunk: include the trunk.

    Raises:
        BundleError: `bundle` is not a bundle, or lacks one of the experts.
        ValueError: `experts` is not a valid selector for this model.
    """
    manifest = load_manifest(bundle)
    files = [*manifest.trunk, *manifest.draft] if trunk else []
    if experts is not None:
        files += expert_files(manifest, experts)
    files += [_entry(bundle, name) for name in (SIGNATURE_NAME, MANIFEST_NAME) if (bundle / name).is_file()]
    return Needed(files, sum(file.bytes for file in files), manifest.model_sha256)


def expert_files(manifest: Manifest, selector: str) -> list[FileEntry]:
    """The files of the experts that `selector` names.

    Raises:
        BundleError: the bundle lacks one of the experts.
        ValueError: the selector is not valid for this model.
    """
    dims = manifest.dims
    ids = parse_selector(selector, layers=dims.layers, experts=dims.experts, slices=dims.slices)
    return [file for entry in manifest.entries(ids) for file in entry.files]


def _entry(bundle: Path, name: str) -> FileEntry:
    raw = (bundle / name).read_bytes()
    return FileEntry(path=name, bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
