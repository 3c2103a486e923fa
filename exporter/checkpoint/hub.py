"""Checkpoints on the Hugging Face hub: which argument means one, which of its files are needed, and downloading them.

The huggingface_hub library downloads into its own cache, which other programs share, and finds the token: in
`HF_TOKEN`, or where `hf auth login` put it. Weights are only fetched once config.json shows that the model can be
exported, and once there is room for them and for the bundle.
"""

import io
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common.disk_space import Room, check_room
from common.sizes import readable_bytes
from exporter.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, weight_map
from exporter.checkpoint.hub_errors import hub_error, hub_is_silent
from exporter.checkpoint.source_file import TEXT_FILES, read_json
from exporter.errors import CheckpointError, DownloadError
from wire import __version__

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
RoomFor = Callable[[Path, int], Room]
"""Room that is needed besides the download, from the folder with config.json but no weights, and the weights' bytes.

It may refuse the checkpoint (CheckpointError), before its weights are downloaded.
"""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_API_TIMEOUT_S = 30.0
_DEFAULT_REVISION = "main"


def locate_checkpoint(name: str, *, revision: str | None, progress: Progress, room_for: RoomFor | None = None) -> Path:
    """The folder of a checkpoint that the user named by its path or by its hub id, downloaded first if needed.

    A folder that exists is meant as such. Otherwise `owner/name` is a hub id, unless the working folder has a folder
    `owner` and no revision is given: then it may be a misspelt path.

    Args:
        name: a path, or a hub id `owner/name`.
        revision: branch, tag or commit on the hub; None for the main branch, or for a folder.

    Raises:
        CheckpointError: `name` is neither, or there are no weights that can be exported.
        DownloadError: the hub could not be reached, or does not give the files.
        StorageError: there is too little room.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{name} is a folder here, and --revision is for checkpoints on the hub: leave it out"
            )
        return path
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{name} is a GGUF file, whose weights are already quantised: export the model that it was made from, as a "
            "folder or hub id with safetensors (the GGUF repository names it as its base model)"
        )
    if path.exists():
        raise CheckpointError(f"{name} is not a folder: give the folder that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name} is not a folder: give the folder that holds config.json, or a hub id such as Qwen/Qwen3-30B-A3B"
        )
    if revision is None and path.parent.is_dir():
        raise CheckpointError(
            f"{name} is not a folder, but {path.parent} is one: correct the path, or add "
            f"--revision {_DEFAULT_REVISION} if you mean the hub's model of this name"
        )
    return fetch_checkpoint(name, revision=revision, progress=progress, room_for=room_for)


def is_hub_id(name: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name`."""
    return _HUB_ID.fullmatch(name) is not None


class HubFile(NamedTuple):
    """A file of a repository.

    Attributes:
        name: path in the repository.
        bytes: its size.
    """

    name: str
    bytes: int


def needed_texts(files: Iterable[HubFile]) -> list[HubFile]:
    """The files without weights that an export reads: config, tokenizer, and the index of the weights."""
    wanted = {*TEXT_FILES, INDEX_FILE}
    return [file for file in files if file.name in wanted]


def needed_weights(
    repository: str, files: Sequence[HubFile], shards: Sequence[str], *, base: str | None
) -> list[HubFile]:
    """The files with weights that an export reads: one safetensors file, or the shards of its index.

    Args:
        repository: hub id, for messages.
        shards: names of the index's files; empty if there is no index.
        base: model that this one was made from, as the repository says.

    Raises:
        CheckpointError: the repository has no safetensors, or lacks a shard.
    """
    by_name = {file.name: file for file in files}
    # As for folders: the single file goes first.
    wanted = [SINGLE_FILE] if SINGLE_FILE in by_name else list(shards)
    if missing := [name for name in wanted if name not in by_name]:
        raise CheckpointError(
            f"{repository} lacks {missing[0]}, which its {INDEX_FILE} names: choose another --revision"
        )
    if wanted:
        return [by_name[name] for name in wanted]
    kinds = {Path(file.name).suffix for file in files}
    if ".gguf" in kinds:
        original = f"{base}, which it was made from" if base else "the repository of the model that it was made from"
        raise CheckpointError(f"{repository} holds GGUF files, whose weights are already quantised: export {original}")
    if kinds & {".bin", ".pt", ".pth"}:
        raise CheckpointError(
            f"{repository} holds pickled weights only: choose a --revision with safetensors (often a pull request such "
            "as refs/pr/1), or load it with transformers and save it with save_pretrained(…)"
        )
    raise CheckpointError(
        f"{repository} has neither {SINGLE_FILE} nor {INDEX_FILE}: it holds no model that can be exported"
    )


def fetch_checkpoint(
    repository: str, *, revision: str | None = None, progress: Progress, room_for: RoomFor | None = None
) -> Path:
    """The folder of a hub model in the hub's cache, with all files that an export reads.

    Files that are complete in the cache are not downloaded again. If the hub can't be reached, a complete copy there
    is used.

    Args:
        repository: hub id.
        revision: branch, tag or commit; None for the main branch.
        progress: called with the downloaded bytes in words, and their share.
        room_for: see `RoomFor`.

    Raises:
        CheckpointError: the repository has no weights that can be exported.
        DownloadError: the hub could not be reached and the cache has no copy, or the hub does not give the files.
        StorageError: there is too little room.
    """
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)  # a line per request
    progress(f"asking the hub for {repository}", 0.0)
    try:
        return _fetch(repository, revision, progress, room_for)
    except DownloadError as error:
        silent = isinstance(error.__cause__, Exception) and hub_is_silent(error.__cause__)
        if not silent or (cached := _complete_copy(repository, revision)) is None:
            raise
        log.warning("no answer from the hub: using the copy in %s", cached)
        return cached


def _fetch(repository: str, revision: str | None, progress: Progress, room_for: RoomFor | None) -> Path:
    from huggingface_hub import HfApi

    with _library(repository, revision):
        info = HfApi(library_name="wdmoe", library_version=__version__).model_info(
            repository, revision=revision, files_metadata=True, timeout=_API_TIMEOUT_S
        )
    files = [HubFile(file.rfilename, file.size or 0) for file in info.siblings or []]
    texts = needed_texts(files)
    if not any(file.name == "config.json" for file in texts):
        needed_weights(repository, files, [], base=_base_model(info))  # has more to say about GGUF and the like
        raise CheckpointError(f"{repository} has no config.json: it is not a model of the transformers library")
    folder = _download(repository, revision, texts, None)
    weights = needed_weights(repository, files, _shards(folder), base=_base_model(info))
    left = sum(file.bytes for file in weights if not (folder / file.name).exists())
    rooms = [Room(_cache_folder(), left, "the download")]
    rooms += [room_for(folder, sum(file.bytes for file in weights))] if room_for else []
    check_room(rooms, remedy="free some space, choose another folder, or set HF_HOME to one for downloads")
    return _download(repository, revision, [*texts, *weights], _Bytes(left, progress))


@contextmanager
def _library(repository: str, revision: str | None) -> Iterator[None]:
    """Call the hub's library; its errors become this project's."""
    try:
        yield
    # The library raises errors of its own, of its HTTP client, of the operating system and of its native downloader.
    except Exception as error:
        raise hub_error(error, repository, revision) from error


class _Bytes:
    """Shows how many bytes of a download are there.

    Args:
        total: bytes to download.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress

    def show(self, done: float) -> None:
        if self._total:
            done = min(done, self._total)
            self._progress(f"{readable_bytes(done)} of {readable_bytes(self._total)}", done / self._total)


def _download(repository: str, revision: str | None, files: Sequence[HubFile], shown: _Bytes | None) -> Path:
    """Download files of a repository; returns their folder."""
    from huggingface_hub import snapshot_download

    with _library(repository, revision):
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[file.name for file in files],
            tqdm_class=_bar_class(shown),
            library_name="wdmoe",
            library_version=__version__,
        )
    return Path(folder)


def _bar_class(shown: _Bytes | None) -> Any:
    """A progress bar for the library that draws nothing itself, and passes on the bytes that it counts."""
    from tqdm import tqdm

    # The library's own bar counts nothing where bars are switched off (HF_HUB_DISABLE_PROGRESS_BARS).
    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        monitor_interval = 0  # no thread that redraws

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # of a group of bars
            super().__init__(*args, **(options | {"disable": False, "file": io.StringIO()}))  # type: ignore[no-untyped-call, unused-ignore]

        def update(self, n: float | None = 1) -> bool | None:
            updated: bool | None = super().update(n)
            # Some bars count files; of those for bytes, one counts what is received and one what is written.
            if shown is not None and self.unit == "B":
                shown.show(self.n)
            return updated

    Bar.set_lock(threading.RLock())  # by default one between processes, which needs a semaphore
    return Bar


def _shards(folder: Path) -> list[str]:
    """Names of the shards of a folder's index; empty if it has none."""
    index = read_json(folder, INDEX_FILE)
    return [] if index is None else sorted(set(weight_map(folder, index).values()))


def _base_model(info: Any) -> str | None:
    base = getattr(info.card_data, "base_model", None)
    return base[0] if isinstance(base, list) and base else base if isinstance(base, str) else None


def _cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _complete_copy(repository: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache; None if it lacks the config or weights."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json", revision=revision or _DEFAULT_REVISION)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    wanted = [SINGLE_FILE] if (folder / SINGLE_FILE).exists() else _shards(folder)
    return folder if wanted and all((folder / name).exists() for name in wanted) else None
