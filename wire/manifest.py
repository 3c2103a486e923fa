"""The manifest of a bundle: what it holds, what it was made from, and how a device proves that it computes correctly.

A bundle folder holds `manifest.json`, `trunk/` (safetensors, Hugging Face config and tokenizer) and
`experts/L00/E0.onnx` with its weights beside it in `E0.weights`. A node may hold any part of the experts.
"""

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from wire.errors import BundleError
from wire.experts import ExpertId
from wire.tensors import Array

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
"""`wire.signature` writes and checks it; the name is here because that module needs cryptography."""
MAX_MANIFEST_BYTES = 64 << 20
MOST_EXPERTS = 1 << 16
"""Largest number of experts in all layers together, three times that of the largest known models."""

EXACT_SUMS = ("session.x64quantprecision", "1")
"""Setting of every onnxruntime session of an expert, so that int8-dynamic gives the same outputs on all processors.
Without it, x86 processors with AVX2 but no VNNI add pairs of products in 16 bits, which overflow."""

Scheme = Literal["int4", "int8", "int8-dynamic", "fp16", "fp32"]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Dims(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Dimensions of the model, as counts.

    Raises:
        ValueError: more than `MOST_EXPERTS` in all. The limit bounds the work of expanding the selector in a status.
    """

    hidden: Positive
    intermediate: Positive
    layers: Positive
    experts: Positive
    top_k: Positive
    vocab: Positive
    max_positions: Positive

    def __post_init__(self) -> None:
        if self.layers * self.experts > MOST_EXPERTS:
            raise ValueError(f"{self.layers} layers of {self.experts} experts: at most {MOST_EXPERTS} in all")


class Quantisation(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the experts' weights are stored.

    Attributes:
        scheme: `int4` and `int8` are blockwise (MatMulNBits), `int8-dynamic` per output channel with
            activations quantised per call, `fp16` and `fp32` plain.
        block: weights along the input dimension that share a scale; 0 where there are no blocks.
        symmetric: no zero points.
        backend: what made the graphs: `direct` (this project) or `optimum`.
    """

    scheme: Scheme
    block: Annotated[int, Meta(ge=0)] = 0
    symmetric: bool = False
    backend: Literal["direct", "optimum"] = "direct"

    def __str__(self) -> str:
        block = f" b{self.block}" if self.block else ""
        symmetric = " symmetric" if self.symmetric and self.block else ""
        via = "" if self.backend == "direct" else f" via {self.backend}"
        return f"{self.scheme}{block}{symmetric}{via}"


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file of the bundle.

    Attributes:
        path: relative to the bundle folder, with forward slashes.
    """

    path: str
    bytes: Annotated[int, Meta(ge=0)]
    sha256: Sha256

    def __post_init__(self) -> None:
        pure = PurePosixPath(self.path)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in self.path:
            raise ValueError(f"path {self.path!r} leaves the bundle folder")


class ExpertEntry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One exported expert.

    Attributes:
        files: the `.onnx` graph first, then its weights.
        probe_output: base64 of the fp16 output [hidden] for `probe_input(hidden)`, computed by onnxruntime on the
            exporting machine.
        error: ‖exported − fp32‖ / ‖fp32‖ of outputs for Gaussian inputs.
        source_sha256: SHA-256 of the raw bytes of the source tensors w1, w3, w2, in this order.
    """

    layer: Annotated[int, Meta(ge=0)]
    expert: Annotated[int, Meta(ge=0)]
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1)]
    probe_output: str
    error: float
    source_sha256: Sha256

    @property
    def id(self) -> ExpertId:
        """Layer and index of the expert."""
        return ExpertId(self.layer, self.expert)

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.bytes for f in self.files)


class Source(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The checkpoint that the bundle was made from.

    Attributes:
        name: the checkpoint folder's own name (never its path: bundles are published).
        config_sha256: hash of its config.json.
        header_sha256: hashes of its safetensors headers (names, shapes and offsets of all tensors), by file.
        dtype: number format of the expert weights, as safetensors writes it.
    """

    name: str
    config_sha256: Sha256
    header_sha256: dict[str, Sha256]
    dtype: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that a node or a base station must know about a bundle.

    Attributes:
        probe_tolerance: largest relative error of a probe output on a healthy device.
        tools: versions of the software that made the bundle.
        draft: files of a draft model (`wire.draft`), if the bundle brings one.
    """

    schema: int
    source: Source
    dims: Dims
    quantisation: Quantisation
    probe_tolerance: float
    experts: tuple[ExpertEntry, ...]
    trunk: tuple[FileEntry, ...]
    tools: dict[str, str]
    draft: tuple[FileEntry, ...] = ()

    @property
    def model_sha256(self) -> str:
        """Hash of source and dims: equal for bundles of one model, whatever their quantisation."""
        return hashlib.sha256(msgspec.json.encode([self.source, self.dims])).hexdigest()

    def entries(self, ids: Iterable[ExpertId]) -> list[ExpertEntry]:
        """Entries of these experts.

        Raises:
            BundleError: the bundle was exported without one of them.
        """
        by_id = {entry.id: entry for entry in self.experts}
        missing = [str(i) for i in ids if i not in by_id]
        if missing:
            raise BundleError(
                f"the bundle has no expert {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}: "
                "export it or choose others"
            )
        return [by_id[i] for i in ids]


def probe_input(hidden: int, rows: int = 1) -> Array:
    """The input, float32 [rows, hidden], with which exported experts are proven.

    It has about unit variance and needs no library's random numbers, so it is the same on every device and in every
    version.
    """
    index = np.arange(rows * hidden, dtype=np.uint64)
    # SplitMix64 from seed 0 (Steele et al. 2014): integer arithmetic modulo 2⁶⁴, exact everywhere.
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return ((uniform - np.float32(0.5)) * np.float32(12**0.5)).reshape(rows, hidden)


def encode_probe_output(output: Array) -> str:
    """`ExpertEntry.probe_output` of a float32 [hidden] output."""
    return base64.b64encode(output.astype("<f2").tobytes()).decode()


def decode_probe_output(text: str, hidden: int) -> Array:
    """The float32 [hidden] output in `ExpertEntry.probe_output`.

    Raises:
        BundleError: not base64, or of another length.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BundleError(f"manifest: probe output is not base64 ({error})") from None
    if len(raw) != 2 * hidden:
        raise BundleError(f"manifest: probe output has {len(raw)} bytes, {2 * hidden} expected")
    return np.frombuffer(raw, "<f2").astype(np.float32)


def load_manifest(bundle: Path) -> Manifest:
    """Read and check `manifest.json` of a bundle folder.

    Raises:
        BundleError: there is no manifest, or it is not a valid one of this schema version.
    """
    return decode_manifest(read_manifest(bundle), bundle)


def read_manifest(bundle: Path) -> bytes:
    """The bytes of `manifest.json` in a bundle folder, at most `MAX_MANIFEST_BYTES`.

    Raises:
        BundleError: there is no manifest, or it is too large.
    """
    path = bundle / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is larger than {MAX_MANIFEST_BYTES >> 20} MiB: not a manifest")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{bundle} is not a finished bundle (no {MANIFEST_NAME}): make one with 'wdmoe-export bundle'"
        ) from None


def decode_manifest(raw: bytes, bundle: Path) -> Manifest:
    """The manifest in `raw`, as read from `bundle`.

    Raises:
        BundleError: it is not a valid manifest of this schema version.
    """
    path = bundle / MANIFEST_NAME
    try:
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema
        if schema != SCHEMA:
            raise BundleError(f"{path} has schema {schema}, this version reads {SCHEMA}: export it again")
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a valid manifest: {error}") from None


def verify_file(bundle: Path, entry: FileEntry) -> None:
    """Check one file's size and SHA-256.

    Raises:
        BundleError: the file is missing, has another size, or was changed.
    """
    path = bundle / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise BundleError(f"{path} has {size} bytes, the manifest says {entry.bytes}: copy it again")
        digest = sha256_file(path)
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: copy it again") from None
    if digest != entry.sha256:
        raise BundleError(f"{path} does not match its SHA-256 in the manifest: it was changed, copy it again")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _SchemaOnly(Struct):
    schema: int
