"""Makes a draft model from a dense Llama: a quantised graph that the base station's CPU runs in a few milliseconds.

The base station lets it guess the next tokens, and the real model then checks several guesses at once
(`bs_coordinator.engine.speculation`). Only a model with the same vocabulary can draft.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from common.files import atomic_write
from exporter.bundle.journal import exclusive
from exporter.checkpoint.slabs import slab_rows
from exporter.checkpoint.source_file import read_json, source_name
from exporter.demo_model.base import Base, Progress, fingerprint, locate_base, open_base
from exporter.draft.draft_graph import QUANTISATION, Matrix, build_draft, plan_draft
from exporter.draft.expert_mean import ExpertMean
from exporter.errors import CheckpointError
from exporter.expert.encoders import Stored, make_encoder
from exporter.expert.expert import HashingWriter, open_writer
from wire import __version__
from wire.draft import DRAFT_FOLDER, DRAFT_NAME, DRAFT_SCHEMA, DraftManifest, tokens_sha256
from wire.manifest import (
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    Quantisation,
    load_manifest,
    sha256_file,
)

GRAPH_NAME, WEIGHTS_NAME = "draft.onnx", "draft.weights"

EXPERTS = Quantisation(scheme="int4", block=32)
"""How the experts that a draft model is for are stored, where no bundle says so: the exporter's default."""


def export_draft(out: Path, *, base: str | None = None, progress: Progress | None = None) -> DraftManifest:
    """Make a draft model in `out`. If that is a bundle, put it into its `draft/` and list its files in the manifest.

    A signature of the bundle is removed: it has to be signed again.

    Args:
        base: the dense Llama, or a Mixtral whose experts' mean is taken: a folder, a `.gguf` file, a hub id, or None
            for the demo models' own dense base.
        progress: called with a stage's name and the fraction done.

    Raises:
        CheckpointError: the base is missing, broken or neither a Llama nor a Mixtral, or has another vocabulary than
            the bundle.
        DownloadError: the base could not be fetched.
        BundleError: another process is writing to the bundle.
        StorageError: `out` can't be written.
    """
    report = progress or (lambda _stage, _fraction: None)
    bundle = load_manifest(out) if (out / MANIFEST_NAME).exists() else None
    located = locate_base(base, report)
    model = _open(located, bundle.quantisation if bundle else EXPERTS)
    if bundle is None:
        return _export(model, located, out, report)
    if model.shape.vocab_size != bundle.dims.vocab:
        raise CheckpointError(
            f"{source_name(located)} has {model.shape.vocab_size} tokens in its vocabulary, the bundle's model "
            f"{bundle.dims.vocab}: only a model with the same vocabulary can draft for it"
        )
    with exclusive(out):
        draft = _export(model, located, out / DRAFT_FOLDER, report)
        _enter(out, bundle)
    return draft


def _open(located: Path, experts: Quantisation) -> Base:
    config = read_json(located, "config.json") if located.is_dir() else None
    return ExpertMean(located, experts) if (config or {}).get("model_type") == ExpertMean.kind else open_base(located)


def _export(model: Base, located: Path, out: Path, report: Progress) -> DraftManifest:
    shape = model.shape
    layout = plan_draft(shape)
    with open_writer(out, WEIGHTS_NAME) as weights:
        for done, (name, matrix) in enumerate(layout.matrices.items()):
            report(f"writing {name}", done / len(layout.matrices))
            _write_matrix(model, matrix, weights)
        weights_entry = weights.entry()
    with open_writer(out, GRAPH_NAME) as graph:
        graph.write(build_draft(shape, layout, WEIGHTS_NAME))
        graph_entry = graph.entry()
    draft = DraftManifest(
        schema=DRAFT_SCHEMA,
        source=source_name(located),
        source_sha256=fingerprint(located),
        quantisation=QUANTISATION,
        vocab=shape.vocab_size,
        tokens_sha256=tokens_sha256(model.tokenizer().get_vocab()),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_positions=shape.max_positions,
        files=(graph_entry, weights_entry),
        tools={"wdmoe": __version__, **{name: importlib.metadata.version(name) for name in ("numpy", "onnx")}},
    )
    with atomic_write(out / DRAFT_NAME) as file:
        file.write(msgspec.json.format(msgspec.json.encode(draft), indent=1))
    report("done", 1.0)
    return draft


def _write_matrix(model: Base, matrix: Matrix, weights: HashingWriter) -> None:
    first, *others = matrix.parts
    weights.pad_to(first.offset)
    if len(matrix.parts) == 1:
        (source,) = matrix.sources
        weights.write(np.ascontiguousarray(_rows(model, source).astype(first.part.dtype)))
        return
    encoder = make_encoder(QUANTISATION, matrix.rows, matrix.columns)
    step = slab_rows(matrix.columns)
    for source in matrix.sources:
        rows = _rows(model, source)
        for start in range(0, len(rows), step):
            weights.write(encoder.encode(rows[start : start + step]))
    pending: list[Stored] = encoder.finish()
    for placed, data in zip(others, pending, strict=True):
        weights.pad_to(placed.offset)
        weights.write(data)


def _rows(model: Base, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows: np.ndarray[Any, np.dtype[np.float32]] = model.tensor(name).float().numpy()
    if not np.isfinite(rows).all():
        raise CheckpointError(f"tensor '{name}' holds NaN or infinite values: it is damaged")
    return rows


def _enter(out: Path, bundle: Manifest) -> None:
    """List the draft model's files in the bundle's manifest."""
    folder = out / DRAFT_FOLDER
    names = (DRAFT_NAME, GRAPH_NAME, WEIGHTS_NAME)
    files = tuple(
        FileEntry(path=f"{DRAFT_FOLDER}/{n}", bytes=(folder / n).stat().st_size, sha256=sha256_file(folder / n))
        for n in names
    )
    if files == bundle.draft:
        return
    # The signature is of the manifest before this change.
    (out / SIGNATURE_NAME).unlink(missing_ok=True)
    manifest = msgspec.structs.replace(bundle, draft=files)
    with atomic_write(out / MANIFEST_NAME) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
