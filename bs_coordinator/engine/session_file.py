"""An unfinished answer on disk: a base station that was killed continues it with the same tokens.

JSON lines: first the question and its settings, then one line per token. An incomplete last line is ignored.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from bs_coordinator.config import SamplingConfig
from common.errors import StorageError
from common.files import append_all
from common.jsonl import decode_json


class Asked(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an answer depends on."""

    model_sha256: str
    quantisation: str
    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int

    @classmethod
    def of(cls, prompt: list[int], config: SamplingConfig, *, model_sha256: str, quantisation: str) -> "Asked":
        """The question that a prompt's token ids and a sampling configuration make for one model."""
        return cls(
            model_sha256=model_sha256,
            quantisation=quantisation,
            prompt=prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
        )


class SessionFile:
    """One answer's file, open for appending.

    Attributes:
        ids: of the tokens in the file.
        finished: whether the answer is complete.
    """

    def __init__(self, file: BinaryIO, ids: list[int], finished: bool) -> None:
        self._file = file
        self.ids = ids
        self.finished = finished

    def add(self, id: int, *, last: bool) -> None:
        """Append a token. The kernel has it when this returns, so it survives a crash of this process.

        Args:
            id: of the token.
            last: whether the answer ends with it.

        Raises:
            StorageError: the file can't be written, for example because the disk is full.
        """
        try:
            append_all(self._file.fileno(), msgspec.json.encode([id, last]) + b"\n")
        except OSError as error:
            raise StorageError(f"can't write {self._file.name}: {error.strerror}") from error
        self.ids.append(id)


@contextmanager
def session_file(path: Path, asked: Asked) -> Iterator[SessionFile]:
    """Create a file, or continue one that holds the same question.

    Raises:
        StorageError: it can't be read or written, is not a session file, or holds another question.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        whole = lines[:-1]
        ids, finished = _read(path, whole, asked)
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)  # prompts are private
            file.truncate(sum(len(line) + 1 for line in whole))
            file.seek(0, os.SEEK_END)
            if not whole:
                append_all(file.fileno(), msgspec.json.encode(asked) + b"\n")
            yield SessionFile(file, ids, finished)
    except OSError as error:
        raise StorageError(f"can't use the session file {path}: {error.strerror}") from error


def _read(path: Path, lines: list[bytes], asked: Asked) -> tuple[list[int], bool]:
    if not lines:
        return [], False
    try:
        known = decode_json(lines[0], Asked)
        tokens = [decode_json(line, tuple[int, bool]) for line in lines[1:]]
    except msgspec.DecodeError:
        raise StorageError(f"{path} is not a session file: name another --session file") from None
    if known != asked:
        different = [f for f in Asked.__struct_fields__ if getattr(known, f) != getattr(asked, f)]
        raise StorageError(f"{path} holds an answer with another {', '.join(different)}: name another --session file")
    return [id for id, _ in tokens], any(last for _, last in tokens)
