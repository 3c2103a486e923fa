"""Reading a checkpoint's files: which links are followed, and which files are not what their names say."""

import re
import stat
from pathlib import Path
from typing import Any

from common.jsonl import finite_json
from exporter.errors import CheckpointError

MAX_TEXT_BYTES = 256 << 20
"""Longest config, tokenizer or index; the largest known tokenizers have some 30 MB."""
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a checkpoint that a base station reads, besides the weights; not every checkpoint has all of them."""
# Placeholders that a clone leaves where the storage backend did not fetch the file itself.
_POINTERS = {b"version https://git-lfs.github.com/spec/": "git-lfs", b"# xet version ": "git-xet"}
POINTER_BYTES = max(map(len, _POINTERS))
_UTF_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Names in a content store: Hugging Face's cache and DVC use the hash alone, git-annex adds its kind, size and suffix.
_CONTENT_NAME = re.compile(r"(?:[A-Z0-9_]+(?:-[a-zA-Z]\d+)+--)?[0-9a-f]{30,128}(?:\.\w+)*")


def source_name(folder: Path) -> str:
    """The name of a checkpoint, a folder or file, for manifests: for a snapshot in the hub's cache, its hub id.

    That cache is `models--OWNER--NAME/snapshots/COMMIT`, so the folder's own name is a hash. Bytes of a name that are
    not UTF-8 are escaped.
    """
    folder = folder.resolve() if folder.is_dir() else folder.absolute()  # a file there is a link to a hash
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name.encode(errors="backslashreplace").decode()


def locate(folder: Path, name: str) -> Path:
    """Path of the file `name` of a checkpoint, which need not exist.

    A link may lead out of the folder only to a file that is named by a hash, as content stores do (Hugging Face's
    cache, git-annex, DVC): otherwise a foreign checkpoint could make an export publish any file of this machine.

    Raises:
        CheckpointError: it is a link that leaves the folder, or not a plain file.
    """
    path = folder / name
    try:
        target = path.resolve(strict=True)
        plain = stat.S_ISREG(target.stat().st_mode)
    except FileNotFoundError:
        return path
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if folder.resolve() not in target.parents and not _CONTENT_NAME.fullmatch(target.name):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint and in no content store (such as Hugging Face's "
            "cache): put the file itself there if it belongs to the model"
        )
    if not plain:
        raise CheckpointError(f"{path} is not a plain file: download it again")
    return path


def check_pointer(path: Path, start: bytes) -> None:
    """Check that a file is not a placeholder for a file in large-file storage.

    Args:
        start: first bytes of the file, `POINTER_BYTES` or more.

    Raises:
        CheckpointError: it is a placeholder.
    """
    for prefix, kind in _POINTERS.items():
        if start.startswith(prefix):
            raise CheckpointError(
                f"{path} is only a {kind} pointer, not the file itself: run 'git lfs install' and 'git lfs pull' in "
                f"{path.parent}, or download it again"
            )


def read_bytes(folder: Path, name: str) -> bytes | None:
    """Content of a small file of a checkpoint; None if there is none.

    Raises:
        CheckpointError: it can't be read, leads out of the checkpoint, is too long or only a placeholder; or its text
            starts with a byte order mark or is not UTF-8.
    """
    path = locate(folder, name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is missing: download it again") from None
        return None
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{path} is longer than {MAX_TEXT_BYTES >> 20} MiB: it does not belong to a model")
    check_pointer(path, data)
    if not name.endswith(".model"):
        _check_utf8(path, data)
    return data


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a small file of a checkpoint; None if there is none.

    Raises:
        CheckpointError: as `read_bytes`, or the file is not a JSON object of finite numbers, or gives a key twice with
            different values.
    """
    data = read_bytes(folder, name)
    return None if data is None else parse_json(folder / name, data)


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object that is the content of `path`.

    Raises:
        CheckpointError: it is not a JSON object of finite numbers, or gives a key twice with different values.
    """
    try:
        document = finite_json(data.decode(), _unambiguous)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{key[:80]!r} is given twice, with different values")
    return found


def _check_utf8(path: Path, data: bytes) -> None:
    for mark, encoding in _UTF_MARKS.items():
        if data.startswith(mark):
            raise CheckpointError(
                f"{path} starts with a byte order mark ({encoding}), which transformers can't read: save it as UTF-8 "
                "without one"
            )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8: byte {error.start + 1} is 0x{data[error.start]:02x}; download it again"
        ) from None
