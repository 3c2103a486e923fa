"""Operators' notes: a line of text in the run's events, with or without a photo in its folder."""

import shutil
from pathlib import Path

from common.console import describe_os_error
from common.errors import StorageError
from testbed.errors import RunDirectoryError
from testbed.run_directory.directory import NOTE, RunDir
from wire.manifest import sha256_file

PHOTOS = "photos"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".heic")
_MOST_PHOTO_BYTES = 64 << 20
_MOST_TEXT = 4000


def add_note(run: RunDir, text: str, *, photo: Path | None = None) -> None:
    """Add a note to a run, which may be running; a photo is copied into the run's folder.

    Raises:
        RunDirectoryError: the text is empty or too long, or the photo is not a picture or too large.
        StorageError: the note can't be written.
    """
    text = text.strip()
    if not text or len(text) > _MOST_TEXT:
        raise RunDirectoryError(f"a note must have 1 to {_MOST_TEXT} characters, this one has {len(text)}")
    fields = {"text": text}
    if photo is not None:
        fields |= _keep(run, photo)
    run.event(NOTE, **fields)


def _keep(run: RunDir, photo: Path) -> dict[str, str]:
    if photo.suffix.lower() not in ENDINGS or not photo.is_file():
        raise RunDirectoryError(f"{photo} is not a photo: --photo takes a file that ends in {', '.join(ENDINGS)}")
    if photo.stat().st_size > _MOST_PHOTO_BYTES:
        raise RunDirectoryError(f"{photo} is too large: --photo takes files of at most {_MOST_PHOTO_BYTES >> 20} MiB")
    sha256 = sha256_file(photo)
    # Named by its content: equal photos are kept once, and the original file name reveals nothing.
    kept = run.path / PHOTOS / f"{sha256[:16]}{photo.suffix.lower()}"
    try:
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_name(f".{kept.name}")
        shutil.copyfile(photo, temporary)
        temporary.replace(kept)
    except OSError as error:
        raise StorageError(f"can't keep {photo}: {describe_os_error(error)}") from error
    return {"photo": f"{PHOTOS}/{kept.name}", "photo_sha256": sha256}
