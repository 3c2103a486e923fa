"""The journal of an export: a file of JSON rows with the finished experts, from which an interrupted export resumes.

The first row says what is exported and how; one row follows per finished expert. The file marks a folder as
an unfinished bundle and goes away when the manifest is there.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from common.console import describe_os_error
from common.errors import StorageError
from common.files import append_all, atomic_write, folder_lock
from common.jsonl import decode_json
from wire.errors import BundleError
from wire.experts import UnitId
from wire.manifest import ExpertEntry, FileEntry, Quantisation, Source, verify_file

JOURNAL_NAME = "export-state.jsonl"


class JournalHeader(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """First row of a journal.

    Attributes:
        experts: selector of all experts to be exported.
        slices: into which each expert is cut.
        shards: size in bytes and modification time in ns of each source file, by name.
        tools: versions of the encoding software; another version may encode differently.
    """

    source: Source
    quantisation: Quantisation
    experts: str
    shards: dict[str, tuple[int, int]]
    tools: dict[str, str]
    slices: int = 1


def journal_path(bundle: Path) -> Path:
    """Path of a bundle's journal."""
    return bundle / JOURNAL_NAME


def read_journal(bundle: Path, header: JournalHeader) -> dict[UnitId, ExpertEntry]:
    """Finished experts whose files match their hashes; none if the source's files or the tools have changed.

    Raises:
        BundleError: the journal is of an export with other parameters.
    """
    try:
        first, *rows = journal_path(bundle).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    try:
        found = decode_json(first, JournalHeader)
    except msgspec.DecodeError:
        return {}
    wanted = (header.source, header.quantisation, header.experts, header.slices)
    if (found.source, found.quantisation, found.experts, found.slices) != wanted:
        cut = f" in {found.slices} slices" if found.slices > 1 else ""
        raise BundleError(
            f"{bundle} holds another unfinished export ({found.source.name}, {found.quantisation}, "
            f"{found.experts}{cut}): choose another folder or remove it"
        )
    done: dict[UnitId, ExpertEntry] = {}
    if found == header:
        for row in rows:
            # The last row may be incomplete if the export was killed.
            with suppress(msgspec.DecodeError):
                entry = decode_json(row, ExpertEntry)
                if is_intact(bundle, entry.files):
                    done[entry.id] = entry
    return done


def is_intact(bundle: Path, files: Iterable[FileEntry]) -> bool:
    """Whether these files of the bundle match their hashes."""
    try:
        for file in files:
            verify_file(bundle, file)
    except (BundleError, OSError):
        return False
    return True


def start_journal(bundle: Path, header: JournalHeader, done: Mapping[UnitId, ExpertEntry]) -> None:
    """Replace the journal by one with the finished experts.

    Raises:
        StorageError: the journal can't be written.
    """
    with atomic_write(journal_path(bundle)) as file:
        for row in (header, *done.values()):
            file.write(msgspec.json.encode(row) + b"\n")


def append_entry(bundle: Path, entry: ExpertEntry) -> None:
    """Add a finished expert.

    Raises:
        StorageError: the journal can't be written.
    """
    path = journal_path(bundle)
    try:
        with path.open("ab", buffering=0) as file:
            append_all(file.fileno(), msgspec.json.encode(entry) + b"\n")
    except OSError as error:
        raise StorageError(f"can't write {path}: {describe_os_error(error)}") from error


@contextmanager
def exclusive(bundle: Path) -> Iterator[None]:
    """Lock the folder against other exports, and remove temporary files that a killed export left.

    Raises:
        BundleError: another export is writing there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(bundle))
        except BlockingIOError:
            raise BundleError(f"another export is writing to {bundle}: wait for it or choose another folder") from None
        remove_temporary_files(bundle)
        yield


def remove_temporary_files(bundle: Path) -> None:
    """Remove the temporary files that `atomic_write` leaves behind if its process is killed."""
    for pattern in (".*.tmp", "trunk/.*.tmp", "experts/*/.*.tmp", "calibration/.*.tmp"):
        for path in bundle.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
