"""The demo models: real mixtures of experts built from a dense SmolLM2 and low-rank deltas.

Weights are computed and written one tensor at a time. A sum is formed in fp64 and rounded once to
bf16: products of bf16 numbers are exact there, and the order in which a BLAS adds them matters only some forty
bits below a bf16 step, so that the same inputs give the same bytes whatever the number of threads.
This module does not know where the base came from, nor how deltas are stored and what they mean.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.console import describe_os_error
from common.errors import StorageError
from common.user_folders import user_path
from exporter.checkpoint.safetensors_file import TensorRef, encode_header
from exporter.demo_model.base import (
    GGUF_SHA256,
    Base,
    Progress,
    exclusive,
    fingerprint,
    locate_base,
    open_base,
)
from exporter.demo_model.mixtral import MixtralDeltas
from exporter.demo_model.parts import Deltas, Shapes, Weights
from exporter.demo_model.qwen3_moe import Qwen3MoeDeltas
from exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
RECORD_NAME = "wdmoe-demo.json"
MAX_SHARD_BYTES = 500_000_000
MODELS_FOLDER = Path(__file__).resolve().parents[2] / "models"

_BF16_BYTES = 2
# Tokenizer, configurations and index together, generously.
_SMALL_FILES_BYTES = 8_000_000


class DemoModel(NamedTuple):
    """One of the demo models.

    Attributes:
        name: of the whole model, and of the folder with its deltas in the project's `models/`.
        deltas: reads the deltas in a folder.
    """

    name: str
    deltas: Callable[[Path], Deltas]


DEMO_MODELS = {
    "mixtral": DemoModel("smol-mixtral-8x135m", MixtralDeltas),
    "qwen3-moe": DemoModel("smol-qwen3moe-16x", Qwen3MoeDeltas),
}
"""The demo models by their names on the command line."""
DEFAULT_MODEL = "mixtral"


def assemble_demo_model(
    out: Path,
    *,
    model: str = DEFAULT_MODEL,
    base: str | None = None,
    deltas: Path | None = None,
    layers: int | None = None,
    made: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Build a demo model in `out`, or return at once if it is already there, complete and made from the same inputs.

    Args:
        out: the folder to make; if it exists, it must be empty or hold a demo model, which is replaced.
        model: one of `DEMO_MODELS`.
        base: the dense model: a folder, a `.gguf` file, a hub id `owner/name`, or None for the default.
        deltas: the folder with the model's deltas; None means the project's own.
        layers: number of layers to keep, from the first, for a small model in tests; None keeps all.
        made: a folder that may hold the same model already, which is copied then.
        progress: called with a stage's name and the fraction done, 0 to 1 and never falling.

    Returns:
        `out`, which transformers' `AutoModelForCausalLM` and `AutoTokenizer` can load.

    Raises:
        CheckpointError: base or deltas are missing or broken, or do not belong together.
        DownloadError: the base could not be fetched or has the wrong hash.
        StorageError: `out` can't be written, has too little space, or holds something else.
    """
    report = progress or (lambda _stage, _fraction: None)
    target = out.expanduser().resolve()
    chosen = DEMO_MODELS[model]
    if deltas is None and not (MODELS_FOLDER / chosen.name).is_dir():
        raise CheckpointError(
            "the demo models' weights are not part of the installed package: clone the project and run this there, "
            f"after pip install -e '.[testbed]'; or name the clone's models/{chosen.name} with "
            "'wdmoe-export demo-model … --deltas'"
        )
    expert_deltas = chosen.deltas(deltas or MODELS_FOLDER / chosen.name)
    kept = expert_deltas.layers if layers is None else layers
    if not 1 <= kept <= expert_deltas.layers:
        raise CheckpointError(
            f"can't keep {kept} layers: the deltas in {expert_deltas.folder} have {expert_deltas.layers}"
        )
    # The hash of the default base is known, so a finished model is recognised without a download.
    source = None if base is None else locate_base(base, report)
    record: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "base_sha256": GGUF_SHA256 if source is None else fingerprint(source),
        "delta_sha256": expert_deltas.sha256(),
        "layers": kept,
    }
    if _is_finished(target, record):
        report("already there", 1.0)
        return out
    _refuse_foreign(target)
    if made is not None and _is_finished(made, record):
        waiting = "waiting for another assembly in this folder"
        with exclusive(target.parent, lambda: report(waiting, 0.0)), _storage_errors(target):
            if not _is_finished(target, record):
                _copy(made, target, report)
        report("done", 1.0)
        return out
    dense = open_base(source or locate_base(None, report))
    expert_deltas.check_fits(dense.shape)
    with exclusive(target.parent, lambda: report("waiting for another assembly in this folder", 0.0)):
        if not _is_finished(target, record):
            with _storage_errors(target):
                _build(target, dense, expert_deltas.weights(dense, kept), record, report)
    report("done", 1.0)
    return out


def write_safetensors(path: Path, shapes: Shapes, tensors: Iterable["torch.Tensor"]) -> str:
    """Write bf16 tensors one by one, in the order of `shapes`; returns the file's SHA-256.

    The format wants all offsets in front. They follow from the shapes, so no more than one tensor is in
    memory, and a full disk is an OSError like any other.

    Raises:
        CheckpointError: a tensor has another shape than announced, or holds NaN or infinity.
        OSError: the file could not be written.
    """
    import torch

    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        write(encode_header(TensorRef(name, path, "BF16", shape, 0) for name, shape in shapes.items()))
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise CheckpointError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
            rounded = tensor.to(torch.bfloat16).contiguous()
            if not bool(torch.isfinite(rounded).all()):
                raise CheckpointError(f"{name} holds NaN or infinity")
            write(rounded.view(torch.int16).numpy().data.cast("B"))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _shards(groups: list[Shapes]) -> dict[str, Shapes]:
    """Fill files with whole groups up to the size limit; keys are file names."""
    shards: list[Shapes] = [{}]
    used = 0
    for group in groups:
        size = _size_bytes(group)
        if used and used + size > MAX_SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1] |= group
        used += size
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def _size_bytes(shapes: Shapes) -> int:
    return sum(_BF16_BYTES * math.prod(shape) for shape in shapes.values())


def demo_model_path(model: str = DEFAULT_MODEL, layers: int | None = None) -> Path:
    """Folder in the user's cache of a demo model that the demo has made, or will make."""
    name = DEMO_MODELS[model].name
    return user_path("cache") / "models" / (name if layers is None else f"{name}-{layers}-layers")


def _copy(made: Path, target: Path, report: Progress) -> None:
    """Copy a finished model; the caller holds the lock of the parent folder."""
    report(f"copying {made}, made before", 0.0)
    needed, free = sum(file.stat().st_size for file in made.iterdir()), shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(f"{target} needs {needed / 1e6:.0f} MB, only {free / 1e6:.0f} MB are free there")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(made, partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(target: Path, base: Base, weights: Weights, record: dict[str, Any], report: Progress) -> None:
    partial = target.with_name(f".{target.name}.partial")
    replaced = target.with_name(f".{target.name}.replaced")
    # The caller holds the lock of the parent folder, so these are left from a run that was killed.
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    shards = _shards(weights.groups())
    needed = sum(_size_bytes(shapes) for shapes in shards.values()) + _SMALL_FILES_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(f"{target} needs {needed / 1e6:.0f} MB, only {free / 1e6:.0f} MB are free there")
    try:
        partial.mkdir()
        report("reading the tokenizer", 0.0)
        _write_descriptions(partial, base, weights)
        hashes = _write_weights(partial, weights, shards, report)
        files = {
            file.name: {
                "bytes": file.stat().st_size,
                **({"sha256": hashes[file.name]} if file.name in hashes else {}),
            }
            for file in sorted(partial.iterdir())
        }
        _write_json(partial / RECORD_NAME, {**record, "files": files})
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_weights(folder: Path, weights: Weights, shards: dict[str, Shapes], report: Progress) -> dict[str, str]:
    """Write all shards and their index; returns each shard's SHA-256."""
    total = sum(_size_bytes(shapes) for shapes in shards.values())
    written = 0

    def values(shapes: Shapes) -> Iterator["torch.Tensor"]:
        nonlocal written
        for name, shape in shapes.items():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            report(f"writing layer {layer[1]}" if layer else f"writing {name.split('.')[-2]}", written / total)
            yield weights.tensor(name)
            written += _BF16_BYTES * math.prod(shape)

    hashes = {file: write_safetensors(folder / file, shapes, values(shapes)) for file, shapes in shards.items()}
    weight_map = {name: file for file, shapes in shards.items() for name in shapes}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes


def _write_descriptions(folder: Path, base: Base, weights: Weights) -> None:
    """Write tokenizer, chat template and configurations."""
    tokenizer = base.tokenizer()
    _write_tokenizer(folder, tokenizer, base.shape.max_positions)
    tokens = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    _write_json(folder / "config.json", {**weights.config(), **tokens})
    _write_json(folder / "generation_config.json", tokens)


def _write_tokenizer(folder: Path, tokenizer: Any, max_positions: int) -> None:
    # save_pretrained would not raise OSError on a full disk, and would write the source's path into the file.
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: str(token) for name in names if (token := getattr(tokenizer, name)) is not None}
    settings = {
        # The class name that transformers 4 and 5 both know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _is_finished(target: Path, record: dict[str, Any]) -> bool:
    """Whether `target` was made from the same inputs and all its files have their size."""
    try:
        found = json.loads((target / RECORD_NAME).read_bytes())
        if any(found.get(key) != value for key, value in record.items()):
            return False
        return all((target / name).stat().st_size == file["bytes"] for name, file in found["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _refuse_foreign(target: Path) -> None:
    """Raise StorageError if building at `target` would destroy something that is not a demo model."""
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file: name a folder")
    if not (target / RECORD_NAME).exists() and any(target.iterdir()):
        raise StorageError(f"{target} holds something that is not a demo model: name another folder")


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"can't write {target}: {describe_os_error(error)}") from error
