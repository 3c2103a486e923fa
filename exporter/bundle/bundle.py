"""Exports a checkpoint to a bundle: trunk and experts in several processes, the manifest last.

An export that was interrupted goes on where it stopped: every finished expert leaves a row in a journal,
and is kept when its files still match. `manifest.json` is written last, so a folder with one is complete; where a
bundle is repaired, the one before waits beside the journal until then.
"""

import dataclasses
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common.errors import StorageError, WdmoeError
from common.files import atomic_write
from common.memory import available_bytes
from exporter.bundle.journal import (
    JournalHeader,
    append_entry,
    exclusive,
    is_intact,
    journal_path,
    read_journal,
    remove_temporary_files,
    start_journal,
)
from exporter.bundle.trial import try_trunk
from exporter.bundle.trunk import TrunkJob, check_tokenizer, copy_tensors, copy_texts, texts_current, trunk_bytes
from exporter.bundle.workers import Job, export_all, processes_that_fit
from exporter.calibration.text import CalibrationText, cut_windows
from exporter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import CheckpointError
from exporter.expert.calibrated import METHOD, calibration_bytes
from exporter.expert.expert import ExpertJob, hash_source, slice_bounds, slice_of
from exporter.expert.graph import SILU, plan_layout
from exporter.expert.layer_inputs import layer_bytes
from exporter.expert.probe import probe_tolerance
from wire import __version__
from wire.errors import BundleError
from wire.experts import ExpertId, UnitId, expert_of, format_selector, units_of
from wire.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    SIGNATURE_NAME,
    Calibration,
    ExpertEntry,
    FileEntry,
    Manifest,
    Quantisation,
    decode_manifest,
    load_manifest,
)

_BEFORE_NAME = "manifest-before.json"
CALIBRATION_FOLDER = "calibration"
"""Inputs of the experts on the calibration text; removed when all experts are done."""
_CAPTURED_NAME = "captured.json"
_TOOLS = ("numpy", "onnx", "onnxruntime")
# Size of graph, journal row and manifest entry per expert, roughly.
_EXTRA_BYTES = 16 << 10
Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        kept: experts, or slices, that were already there, complete and undamaged.
        source_bytes: size of the exported experts in the checkpoint.
        up_to_date: whether there was nothing to do.
        lost: one line for each thing that the bundle had and no longer has, that is left out of it, or that its chat
            template refuses.
    """

    manifest: Manifest
    kept: int
    source_bytes: int
    up_to_date: bool
    lost: tuple[str, ...]


def export_bundle(
    checkpoint: Path | Checkpoint,
    out: Path,
    quantisation: Quantisation,
    *,
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    jobs: int,
    slices: int = 1,
    preset: str = "",
    calibrate: CalibrationText | None = None,
    calibration_tokens: int = 16384,
    progress: Progress | None = None,
    calibration_progress: Progress | None = None,
) -> ExportResult:
    """Export the trunk and the chosen experts of a checkpoint.

    A draft model that the bundle has stays in it while its files are right, and a signature while the manifest is what
    was signed.

    Args:
        checkpoint: its folder, or the checkpoint itself if it is open.
        layers, experts: indices to export; None for all. Layers without experts are not counted.
        jobs: number of processes, fewer if RAM is short.
        slices: models to cut each expert into.
        preset: quantisation preset of the optimum backend.
        calibrate: choose the codes of int4 or int8 experts for this text's activations.
        calibration_tokens: of the text, at most.
        progress: called with the number of finished experts, or slices, and of all; first before any is exported.
        calibration_progress: called with the number of layers that the text has passed and of all layers.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of an unknown family, has no tokenizer, or a base station
            would refuse it or fail while it answers; or transformers can't run it for a calibration.
        BundleError: `out` holds something else, or another export is writing there.
        WdmoeError: the optimum backend can't export this model's experts, or the text is too short.
        StorageError: `out` can't be written or is too small.
        ValueError: the experts can't be cut into that many slices.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    check_tokenizer(source)
    slice_bounds(source.dims.intermediate, quantisation, slices)
    if quantisation.backend == "optimum" and slices > 1:
        raise WdmoeError("--via optimum exports whole experts only: leave it or --slices out")
    if quantisation.backend == "optimum" and (graph := source.architecture.expert) != SILU:
        raise WdmoeError(
            f"--via optimum exports experts with silu and without biases, these have {graph}: leave it out"
        )
    inside, folder = out.resolve(), source.folder.resolve()
    if inside == folder or folder in inside.parents:
        raise StorageError(f"{out} lies inside the checkpoint: choose another folder for the bundle")
    ids = [
        id
        for id in sorted(source.experts)
        if (layers is None or id.layer in layers) and (experts is None or id.expert in experts)
    ]
    windows: list[list[int]] = []
    if calibrate is not None:
        windows = cut_windows(source.folder, calibrate, tokens=calibration_tokens, positions=source.dims.max_positions)
        facts = Calibration(method=METHOD, text_sha256=calibrate.sha256, tokens=sum(len(window) for window in windows))
        quantisation = msgspec.structs.replace(quantisation, calibration=facts)
    export = _Export(source, out, quantisation, ids, slices, preset, windows)
    with export.folder():
        return export.run(jobs, progress, calibration_progress)


class _Export:
    """One export into one folder."""

    def __init__(
        self, source: Checkpoint, out: Path, quantisation: Quantisation, ids: Sequence[ExpertId], slices: int,
        preset: str, windows: list[list[int]],
    ) -> None:  # fmt: skip
        self._source, self._out, self._quantisation, self._experts = source, out, quantisation, ids
        self._ids = units_of(ids, slices)
        self._dims = msgspec.structs.replace(source.dims, slices=slices)
        self._preset, self._windows = preset, windows
        self._tokens = sum(len(window) for window in windows)
        self._tools = {"wdmoe": __version__, **{name: importlib.metadata.version(name) for name in _TOOLS}}
        if quantisation.backend == "optimum":
            self._tools["optimum-onnx"] = f"{importlib.metadata.version('optimum-onnx')} ({preset})"
        whole = plan_layout(source.dims, quantisation, source.architecture.expert).bytes
        self._file_bytes = whole // slices
        self._done: dict[UnitId, ExpertEntry] = {}
        self._tensors: tuple[FileEntry, ...] = ()  # the trunk's file of tensors, once it is copied
        self._header = JournalHeader(
            source=source.source,
            quantisation=quantisation,
            experts=format_selector(ids),
            slices=slices,
            shards=source.shard_stamps((*source.trunk, *(ref for id in ids for ref in source.experts[id].tensors))),
            tools=self._tools,
        )

    @contextmanager
    def folder(self) -> Iterator[None]:
        """Make and lock the folder.

        A new folder is removed if the export fails before its first expert, or if the checkpoint turns out to be
        damaged before the trunk is copied.
        """
        new = not self._out.exists()
        if new:
            self._check_space(len(self._ids))
        try:
            self._out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"can't make the folder {self._out}: {error.strerror}") from None
        try:
            with exclusive(self._out):
                try:
                    yield
                finally:
                    remove_temporary_files(self._out)
        except BaseException as error:
            damaged = isinstance(error, CheckpointError) and not self._tensors
            if new and (damaged or not self._done):
                shutil.rmtree(self._out, ignore_errors=True)
            raise

    def run(self, jobs: int, progress: Progress | None, calibration_progress: Progress | None) -> ExportResult:
        """Export what is missing, and write the manifest."""
        source = self._source
        source_bytes = sum(source.experts[id].bytes for id in self._experts)
        finished = self._finished()
        if finished is not None:
            journal_path(self._out).unlink(missing_ok=True)
            (self._out / _BEFORE_NAME).unlink(missing_ok=True)
            shutil.rmtree(self._out / CALIBRATION_FOLDER, ignore_errors=True)
            # What another version let pass may be refused by this one's libraries.
            refused = self._try_trunk() if finished.tools != self._tools else []
            return ExportResult(finished, len(self._ids), source_bytes, up_to_date=True, lost=tuple(refused))
        todo = [id for id in self._ids if id not in self._done]
        kept = len(self._ids) - len(todo)
        self._check_space(len(todo))
        start_journal(self._out, self._header, self._done)
        if (self._out / MANIFEST_NAME).exists():
            (self._out / MANIFEST_NAME).replace(self._out / _BEFORE_NAME)
        texts = tuple(copy_texts(source, self._out))
        trunk = TrunkJob(dataclasses.replace(source, experts={}), self._out)
        calibration = None
        if self._windows and todo:  # transformers reads the trunk for it
            self._tensors = (copy_tensors(trunk),)
            calibration = self._capture(calibration_progress)
        more = calibration_bytes(source.dims, self._tokens) if calibration else 0
        processes = processes_that_fit(jobs, self._file_bytes, available_bytes(), more_bytes=more)
        if processes < min(jobs, len(todo)):
            log.warning("exporting with %d of %d processes: there is not enough RAM for more", processes, jobs)
        work: list[Job] = [] if self._tensors else [trunk]
        work += [self._job(unit, calibration) for unit in todo]
        with export_all(work, processes) as results:
            refused = self._try_trunk()  # while the first jobs are done
            report = progress or (lambda _done, _all: None)
            report(kept, len(self._ids))
            for result in results:
                if isinstance(result, FileEntry):
                    self._tensors = (result,)
                else:
                    append_entry(self._out, result)
                    self._done[result.id] = result
                    report(len(self._done), len(self._ids))
        manifest, lost = self._complete((*self._tensors, *texts))
        if unknown := source.unknown:
            shown = f"{unknown[0]}, …" if len(unknown) > 1 else unknown[0]
            lost.insert(0, f"left out {len(unknown)} tensors that the model of this config.json does not have: {shown}")
        return ExportResult(manifest, kept, source_bytes, up_to_date=False, lost=(*lost, *refused))

    def _job(self, unit: UnitId, calibration: Path | None = None) -> ExpertJob:
        source, slices = self._source, self._dims.slices
        id = expert_of(unit, slices)
        whole = ExpertJob(
            id, source.experts[id], source.dims, self._quantisation, self._out, preset=self._preset,
            graph=source.architecture.expert, calibration=calibration,
        )  # fmt: skip
        return slice_of(whole, unit.expert % slices, slices)

    def _capture(self, progress: Progress | None) -> Path:
        """The folder with the inputs of all experts on the text; what an interrupted export finished is used again."""
        from exporter.calibration.capture import capture  # imports transformers

        folder = self._out / CALIBRATION_FOLDER
        done, header = folder / _CAPTURED_NAME, msgspec.json.encode(self._header)
        if done.exists() and done.read_bytes() == header:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        capture(self._source, self._out / "trunk", self._windows, folder, progress or (lambda *_: None))
        with atomic_write(done) as file:
            file.write(header)
        return folder

    def _try_trunk(self) -> list[str]:
        """Lines about what a base station can't do with this trunk."""
        if self._quantisation.backend == "optimum":
            return [
                "trunk, tokenizer and chat template were not tried: the optimum environment has another transformers"
            ]
        return try_trunk(self._out / "trunk", self._source.dims.vocab, self._source.folder)

    def _complete(self, trunk: tuple[FileEntry, ...]) -> tuple[Manifest, list[str]]:
        """Write the manifest; returns it and the lines of `ExportResult.lost`."""
        draft, lost = self._draft()
        manifest = self._manifest(trunk, draft)
        raw = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        before, signature = self._out / _BEFORE_NAME, self._out / SIGNATURE_NAME
        if signature.exists() and not (before.exists() and before.read_bytes() == raw):
            signature.unlink()
            lost.append(f"removed {signature}, which does not fit the new manifest: 'wdmoe-export sign' signs it again")
        with atomic_write(self._out / MANIFEST_NAME) as file:
            file.write(raw)
        before.unlink(missing_ok=True)
        shutil.rmtree(self._out / CALIBRATION_FOLDER, ignore_errors=True)
        journal_path(self._out).unlink()
        return manifest, lost

    def _draft(self) -> tuple[tuple[FileEntry, ...], list[str]]:
        """Files of the bundle's draft model, and a message if they are damaged and must be left out."""
        try:
            before = decode_manifest((self._out / _BEFORE_NAME).read_bytes(), self._out)
        except (OSError, BundleError):
            return (), []
        if is_intact(self._out, before.draft):
            return before.draft, []
        return (), [f"the draft model in {self._out} is damaged and left out: 'wdmoe-export draft' makes it again"]

    def _finished(self) -> Manifest | None:
        """The manifest of the folder if its bundle is complete; else None, with the finished experts in `_done`."""
        if not (self._out / MANIFEST_NAME).exists():
            if not journal_path(self._out).exists() and any(self._out.iterdir()):
                raise BundleError(f"{self._out} is not empty and not a bundle: choose another folder")
            self._done = read_journal(self._out, self._header)
            return None
        manifest = load_manifest(self._out)
        same = (manifest.source, manifest.quantisation) == (self._source.source, self._quantisation)
        same &= manifest.dims == self._dims
        same &= manifest.tools.get("optimum-onnx") == self._tools.get("optimum-onnx")
        if not same or [entry.id for entry in manifest.experts] != list(self._ids):
            slices = manifest.dims.slices
            held = format_selector((entry.id for entry in manifest.experts), slices)
            cut = f" in {slices} slices" if slices > 1 else ""
            raise BundleError(
                f"{self._out} already holds another bundle ({manifest.source.name}, {manifest.quantisation}, "
                f"{held}{cut}): choose another folder or remove it"
            )
        # Further training changes all weights but no header, so the hash of one expert's weights shows it.
        first = manifest.experts[0]
        if hash_source(self._job(first.id).tensors) != first.source_sha256:
            raise BundleError(
                f"{self._out} was made from other weights than {self._source.folder} holds now: "
                "choose another folder or remove it"
            )
        self._done = {entry.id: entry for entry in manifest.experts if is_intact(self._out, entry.files)}
        whole = len(self._done) == len(self._ids) and is_intact(self._out, (*manifest.trunk, *manifest.draft))
        return manifest if whole and texts_current(self._source, manifest.trunk) else None

    def _manifest(self, trunk: tuple[FileEntry, ...], draft: tuple[FileEntry, ...]) -> Manifest:
        return Manifest(
            schema=SCHEMA,
            source=self._source.source,
            dims=self._dims,
            quantisation=self._quantisation,
            probe_tolerance=probe_tolerance(self._quantisation),
            experts=tuple(self._done[id] for id in self._ids),
            trunk=trunk,
            tools=self._tools,
            architecture=self._source.architecture,
            draft=draft,
        )

    def _check_space(self, units: int) -> None:
        needed = units * (self._file_bytes + _EXTRA_BYTES) + trunk_bytes(self._source)
        if units:
            needed += layer_bytes(self._tokens, self._source.dims) * self._source.dims.layers
        place = next(p for p in (self._out.absolute(), *self._out.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise StorageError(
                f"{place} has {free / 2**20:.1f} MiB free, the bundle needs {needed / 2**20:.1f} MiB: "
                "free some space or choose another folder"
            )
