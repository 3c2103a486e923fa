"""Packs a run into one archive: measured data, checksums, data dictionary and report, by default with pseudonyms."""

import json
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct
from PIL import Image, ImageOps

from common.console import describe_os_error
from common.errors import StorageError
from common.files import atomic_write
from common.jsonl import strict_json
from common.private_files import read_private
from common.user_folders import user_folder
from testbed.archive.dictionary import dictionary_json, dictionary_markdown
from testbed.archive.pseudonyms import Kind, Pseudonyms, texts_under
from testbed.errors import ArchiveError, RunDirectoryError
from testbed.plan.cells import Cell
from testbed.plan.schema import BASELINES
from testbed.report.write import write_report
from testbed.run_directory.archive_file import CHECKSUMS, archive_name, open_compressed
from testbed.run_directory.baselines import BASELINES_FILE, read_baselines
from testbed.run_directory.cell_rows import read_cells
from testbed.run_directory.directory import EVENTS, MANIFEST, MARKER, RunDir, RunManifest, read_run_lines
from testbed.run_directory.file_metadata import described
from testbed.run_directory.notes import PHOTOS
from testbed.run_directory.unpack import check_archive
from wire.manifest import sha256_file

DICTIONARY = "DICTIONARY.md"
README = "README.md"
_UNTOUCHED = frozenset({"text", "token_sha256"})
"""Columns with a model's answers, which are results and not facts about a place."""
_KEY_BYTES = 32
_KEY_FILE = "archive.key"
_LOGS = "logs"
_VOCABULARY = frozenset(
    {"auto", "distributed", "end", "generate", "choice", "perplexity", "start", "external", *BASELINES}
)
"""Words of a run's documents; a host with such a name keeps it."""


class Exported(Struct, frozen=True, kw_only=True):
    """What an archive contains.

    Attributes:
        bytes: size of the archive.
        files: number of files in it.
        replaced: number of different values replaced by pseudonyms, by kind; empty without pseudonyms.
        left_out: files that were left out, each with the reason.
    """

    path: str
    bytes: int
    sha256: str
    files: int
    photos: int
    replaced: dict[Kind, int]
    left_out: list[str]


def export_run(
    run: RunDir, out: Path, *, anonymous: bool = True, key_file: Path | None = None, photos: bool = True,
    report: bool = True,
) -> Exported:  # fmt: skip
    """Write an archive; it appears complete or not at all.

    Args:
        out: must end in `.tar.zst` or `.tar.gz`.
        anonymous: replace names of networks, addresses, hosts and users by pseudonyms.
        key_file: key of the pseudonyms, mode 600. The default is the user's own key, which is made if it is missing.
        photos: include the photos of notes.
        report: include a report of the complete cells.

    Raises:
        ArchiveError: the name has another ending, the file exists already, or the run is larger than archives may be.
        RunDirectoryError: a cell is damaged, or the run is still running.
        StorageError: the archive can't be written.
    """
    name = archive_name(out)
    if out.exists():
        raise ArchiveError(f"{out} exists already: choose another -o")
    if run.is_running():
        raise RunDirectoryError(f"{run.path} is still running: wait for its end or stop it before the export")
    pseudonyms = _pseudonyms(run, key_file) if anonymous else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out.parent) as temporary:
            folder = Path(temporary) / name
            left_out = _stage(run, folder, pseudonyms, photos=photos)
            if report and any(run.is_complete(cell) for cell in run.cells()):
                write_report(RunDir(folder))
            (folder / DICTIONARY).write_text(dictionary_markdown(), encoding="utf-8")
            (folder / "dictionary.json").write_bytes(dictionary_json())
            (folder / README).write_text(_readme(run, name, anonymous=anonymous), encoding="utf-8")
            files = _checksums(folder)
            packed = Path(temporary) / out.name
            _pack(folder, packed)
            check_archive(packed)
            sha256 = sha256_file(packed)
            packed.replace(out)
    except OSError as error:
        raise StorageError(f"can't write {out}: {describe_os_error(error)}") from error
    return Exported(
        path=str(out),
        bytes=out.stat().st_size,
        sha256=sha256,
        files=files,
        photos=len(list(_files(run.path / PHOTOS))) if photos else 0,
        replaced=pseudonyms.replaced if pseudonyms else {},
        left_out=left_out,
    )


def _pseudonyms(run: RunDir, key_file: Path | None) -> Pseudonyms:
    """Pseudonyms that know all hosts and networks named in the run's own documents."""
    plan = run.plan
    keep = {*_VOCABULARY, plan.name, *plan.profiles, *plan.bundles, *(w.name for w in plan.workloads)}
    keep |= {policy.partition(":")[0] for policy in plan.every_policy}
    keep |= set(plan.nodes) if isinstance(plan.nodes, dict) else set()
    keep |= {node for cell in run.cells() if run.is_complete(cell) for node in run.marker(cell).nodes}
    pseudonyms = Pseudonyms(_key(key_file), keep=keep)
    events = run.events()
    pseudonyms.learn("host", [str(run.manifest.machine.get("host", "")), *texts_under("host", events)])
    for rows in read_cells(run):
        for ssid in rows.table("telemetry")["wifi_ssid"].unique().to_pylist():
            pseudonyms.learn("ssid", [ssid] if ssid else [])
    return pseudonyms


def _key(path: Path | None) -> bytes:
    if path is None:
        with user_folder("config") as folder:
            path = folder / _KEY_FILE
            if not path.exists():
                with atomic_write(path, mode=0o600) as file:
                    file.write(secrets.token_bytes(_KEY_BYTES))
    key = read_private(path)
    if len(key) < _KEY_BYTES:
        raise ArchiveError(f"{path} has {len(key)} bytes: --key needs a file of at least {_KEY_BYTES}")
    return key


def _stage(run: RunDir, folder: Path, pseudonyms: Pseudonyms | None, *, photos: bool) -> list[str]:
    """Copy the files of the archive into `folder`; returns the files that were left out, each with the reason."""
    folder.mkdir(parents=True)
    left_out: list[str] = []
    run.events(), read_baselines(run)  # raises an error if a line is damaged
    ids = {cell.id: _renamed_cell(cell, pseudonyms).id for cell in run.cells()}
    _copy_json(run.path / MANIFEST, folder / MANIFEST, pseudonyms)
    for name in (EVENTS, BASELINES_FILE):
        if (run.path / name).exists():
            _copy_json_lines(run.path / name, folder / name, pseudonyms, ids)
    (folder / "cells").mkdir()
    manifest = RunDir(folder).manifest
    for rows in read_cells(run):  # which checks them
        source, target = run.cell_path(rows.cell), folder / "cells" / ids[rows.cell.id]
        target.mkdir()
        _copy_json(source / MARKER, target / MARKER, pseudonyms, id=ids[rows.cell.id])
        for table in sorted(rows.tables):
            _copy_table(source / f"{table}.parquet", target / f"{table}.parquet", pseudonyms, table, manifest)
    for log in _files(run.path / _LOGS):
        target = folder / log.relative_to(run.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = log.read_text(encoding="utf-8", errors="replace")
        target.write_text(pseudonyms.text(text) if pseudonyms else text, encoding="utf-8")
    for photo in _files(run.path / PHOTOS) if photos else ():
        target = folder / photo.relative_to(run.path)
        target.parent.mkdir(exist_ok=True)
        if why := _copy_photo(photo, target, bare=pseudonyms is not None):
            left_out.append(f"{target.relative_to(folder)}: {why}")
    copied = RunDir(folder)
    if sum(copied.is_complete(cell) for cell in copied.cells()) != sum(run.is_complete(cell) for cell in run.cells()):
        raise ArchiveError(
            f"a host or user has the name of something in the plan of {run.path}: export it with --plain"
        )
    return left_out


def _renamed_cell(cell: Cell, pseudonyms: Pseudonyms | None) -> Cell:
    """The cell with pseudonyms in its coordinates, because paths of bundles and tables may contain a user name."""
    if pseudonyms is None:
        return cell
    change = pseudonyms.text
    return Cell(cell.repetition, change(cell.bundle), change(cell.profile), change(cell.workload), change(cell.policy))


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _copy_json(source: Path, target: Path, pseudonyms: Pseudonyms | None, **instead: str) -> None:
    """Copy a JSON document that has been checked; `instead` replaces the values of its fields."""
    document = strict_json(source.read_bytes())
    changed = pseudonyms.tree(document) if pseudonyms else document
    target.write_text(json.dumps({**changed, **instead}, ensure_ascii=False, indent=1), encoding="utf-8")


def _copy_json_lines(source: Path, target: Path, pseudonyms: Pseudonyms | None, ids: dict[str, str]) -> None:
    """Copy a checked JSON Lines file without lines that a crash cut off; `ids` maps old cell ids to new ones."""
    with target.open("w", encoding="utf-8") as file:
        for document in read_run_lines(source, strict_json):
            changed = pseudonyms.tree(document) if pseudonyms else document
            if "cell" in document:
                changed = {**changed, "cell": ids.get(document["cell"], document["cell"])}
            file.write(json.dumps(changed, ensure_ascii=False) + "\n")


def _copy_table(
    source: Path, target: Path, pseudonyms: Pseudonyms | None, name: str, manifest: RunManifest
) -> None:  # fmt: skip
    """Copy the table `name`; `manifest` is the archive's own, from which the copy takes its metadata."""
    if pseudonyms is None:
        shutil.copyfile(source, target)
        return
    table = pq.read_table(source)
    columns = [_renamed(table[name], name, pseudonyms) for name in table.column_names]
    copy = described(pa.table(columns, names=table.column_names), name, manifest)
    pq.write_table(copy, target, compression="zstd")


def _renamed(column: pa.ChunkedArray, name: str, pseudonyms: Pseudonyms) -> pa.ChunkedArray:
    if name in _UNTOUCHED or not (pa.types.is_dictionary(column.type) or pa.types.is_string(column.type)):
        return column
    kinds: dict[str, Kind] = {"wifi_ssid": "ssid", "wifi_bssid": "mac"}

    def change(value: str | None) -> str | None:
        if value is None:
            return None
        return pseudonyms.name(kinds[name], value) if name in kinds else pseudonyms.text(value)

    found = {value: change(value) for value in column.unique().to_pylist()}
    return pa.chunked_array([pa.array([found[v] for v in column.to_pylist()], pa.string())]).cast(column.type)


def _copy_photo(source: Path, target: Path, *, bare: bool) -> str:
    """Copy a photo; returns why it was left out, or an empty text.

    Args:
        bare: remove the metadata that cameras add: place, device, time.
    """
    if not bare:
        shutil.copyfile(source, target)
        return ""
    try:
        with Image.open(source) as image:
            # The orientation is metadata too, so it must be applied to the pixels.
            pixels = ImageOps.exif_transpose(image).convert("RGB")
            pixels.info.clear()
            pixels.save(target, quality=90)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a damaged PNG
        target.unlink(missing_ok=True)
        return f"its metadata can't be removed ({' '.join(str(error).split())})"
    return ""


def _checksums(folder: Path) -> int:
    """Write `SHA256SUMS` in the format of sha256sum; returns the number of files it lists."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    lines = [f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    return len(files)


def _pack(folder: Path, out: Path) -> None:
    """Pack a folder. Equal folders give equal archives: sorted names, no owners, no times."""
    with open_compressed(out, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            info = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
            info.size = path.stat().st_size
            info.mode = 0o644
            with path.open("rb") as file:
                tar.addfile(info, file)


def _readme(run: RunDir, name: str, *, anonymous: bool) -> str:
    manifest = run.manifest
    complete = sum(run.is_complete(cell) for cell in run.cells())
    names = (
        "Names of networks, addresses, hosts and users are pseudonyms (`ssid-…`, `mac-…`, `ip-…`, `host-…`, `user-…`); "
        "equal values have equal pseudonyms. Their key is not in this archive."
        if anonymous
        else "Names of networks, addresses, hosts and users are unchanged."
    )
    return (
        f"# {name}\n\n"
        f"A run of WDMoE: `{manifest.name}`, started {manifest.created}, code {manifest.commit}"
        f"{' with changes' if manifest.dirty else ''}. {complete} of {manifest.cells} cells are complete.\n\n"
        f"{names}\n\n"
        "| file | contents |\n|---|---|\n"
        "| `report.html`, `report.md` | tables, plots and method |\n"
        f"| `{DICTIONARY}`, `dictionary.json` | every table and column with its unit |\n"
        "| `cells/` | one folder per cell with its tables as Parquet |\n"
        "| `*.parquet`, `*.csv` | the tables of all cells, merged |\n"
        f"| `{MANIFEST}` | plan, code, SHA-256 of bundles and data, machine, versions |\n"
        f"| `{EVENTS}` | events, one per line |\n"
        f"| `{BASELINES_FILE}` | baselines of each session |\n"
        f"| `{_LOGS}/`, `{PHOTOS}/` | logs of the nodes; photos of the operators |\n"
        f"| `{CHECKSUMS}` | `sha256sum -c {CHECKSUMS}` checks all files |\n\n"
        "`wdmoe-testbed report` and `wdmoe-testbed compare` take this folder or its archive.\n"
    )
