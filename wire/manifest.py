"""The manifest of a bundle: what it holds, what it was made from, and how a device proves that it computes correctly.

A bundle folder holds `manifest.json`, `trunk/` (safetensors, Hugging Face config and tokenizer) and
`experts/L00/E0.onnx` with its weights beside it in `E0.weights`. A node may hold any part of the experts.
"""

import hashlib
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from common.jsonl import decode_json
from wire.errors import BundleError
from wire.experts import UnitId, unit_name

SCHEMA = 2
READABLE_SCHEMAS = (1, 2)
"""Schema 1 has no `architecture`: all of its bundles are of Mixtral (`mixtral_architecture`)."""
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"
"""`wire.signature` writes and checks it; the name is here because that module needs cryptography."""
MAX_MANIFEST_BYTES = 64 << 20
MOST_EXPERTS = 1 << 16
"""Largest number of experts in all layers together, three times that of the largest known models; with slices, of
slices."""

EXACT_SUMS = ("session.x64quantprecision", "1")
"""Setting of every onnxruntime session of an expert, so that int8-dynamic gives the same outputs on all processors.
Without it, x86 processors with AVX2 but no VNNI add pairs of products in 16 bits, which overflow."""

Scheme = Literal["int4", "int8", "int8-dynamic", "fp16", "fp32"]
Activation = Literal["silu", "gelu", "gelu-tanh", "clamped"]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Dims(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Dimensions of the model, as counts, and into how many slices a bundle cuts each expert.

    Attributes:
        intermediate: inner size of a routed expert.
        layers: layers with experts; `Architecture.layers` says which of the model's layers they are.
        experts: routed experts per such layer.
        slices: parts of each expert, along its inner size, that nodes hold separately. Written only if above 1.

    Raises:
        ValueError: more than `MOST_EXPERTS` slices in all. The limit bounds the work of expanding the selector in a
            status.
    """

    hidden: Positive
    intermediate: Positive
    layers: Positive
    experts: Positive
    top_k: Positive
    vocab: Positive
    max_positions: Positive
    slices: Positive = 1

    def __post_init__(self) -> None:
        if self.layers * self.units > MOST_EXPERTS:
            cut = f" in {self.slices} slices" if self.slices > 1 else ""
            raise ValueError(f"{self.layers} layers of {self.experts} experts{cut}: at most {MOST_EXPERTS} in all")

    @property
    def units(self) -> int:
        """Units per layer that nodes can hold: experts, or their slices."""
        return self.experts * self.slices


class ExpertGraph(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an expert computes: y = w2 (f(w1 x) · g(w3 x)), each product with its bias if there are biases.

    Attributes:
        activation: `silu`, `gelu` (with the error function) and `gelu-tanh` (with its approximation by tanh) are f,
            where g is the identity. `clamped` is gpt-oss's: f(a) = min(a, limit) · sigmoid(alpha · min(a, limit)),
            g(b) = clamp(b, ±limit) + 1.
        biases: whether w1, w3 and w2 have biases.
        alpha, limit: of `clamped`; None for the others.

    Raises:
        ValueError: `alpha` and `limit` don't fit the activation.
    """

    activation: Activation = "silu"
    biases: bool = False
    alpha: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        constants = (self.alpha, self.limit)
        if self.activation != "clamped":
            if constants != (None, None):
                raise ValueError(f"activation {self.activation} has no alpha and no limit")
        elif not all(value is not None and 0 < value < math.inf for value in constants):
            raise ValueError("activation clamped needs a positive alpha and a positive limit")

    def __str__(self) -> str:
        constants = f" (alpha {self.alpha:g}, limit {self.limit:g})" if self.activation == "clamped" else ""
        return f"{self.activation}{constants}{' with biases' if self.biases else ''}"


class RoutingFacts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What config.json says about how the model weighs its experts.

    Attributes:
        score: function of the router's logits from which the weights are taken.
        renormalised: whether the weights of a token's chosen experts are divided by their sum; None if unknown.
        factor: by which the weights are multiplied in the end.
    """

    score: Literal["softmax", "sigmoid", "unknown"] = "unknown"
    renormalised: bool | None = None
    factor: float = 1.0


class Architecture(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model's architecture, as far as its experts go.

    Attributes:
        family: `model_type` in config.json.
        layers: the model's own index, from 0, of each layer with experts, ascending. `ExpertId.layer` is a position in
            this tuple.
        expert: what each expert computes.
        routing: how the model weighs experts.

    Raises:
        ValueError: `layers` is not ascending.
    """

    family: Annotated[str, Meta(min_length=1, max_length=64)]
    layers: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]
    expert: ExpertGraph
    routing: RoutingFacts

    def __post_init__(self) -> None:
        if any(a >= b for a, b in pairwise(self.layers)):
            raise ValueError("architecture: layers are not ascending")


def mixtral_architecture(layers: int) -> Architecture:
    """The architecture of a Mixtral with so many layers."""
    routing = RoutingFacts(score="softmax", renormalised=True)
    return Architecture(family="mixtral", layers=tuple(range(layers)), expert=ExpertGraph(), routing=routing)


class Calibration(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The text on whose activations experts were quantised.

    Attributes:
        method: `gptq`: scales searched by the inputs' mean squares, rounding with error feedback.
        text_sha256: of the text's file.
        tokens: of the text that were used.
    """

    method: Literal["gptq"]
    text_sha256: Sha256
    tokens: Positive


class Quantisation(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the experts' weights are stored.

    Attributes:
        scheme: `int4` and `int8` are blockwise (MatMulNBits), `int8-dynamic` per output channel with
            activations quantised per call, `fp16` and `fp32` plain.
        block: weights along the input dimension that share a scale; 0 where there are no blocks.
        symmetric: no zero points.
        backend: what made the graphs: `direct` (this project) or `optimum`.
        calibration: the text that the codes were chosen for; UNSET, and left out of the JSON, if there was none.
        w2_bits: bits of w2's codes, where int4 keeps them at 8; UNSET, and left out of the JSON, elsewhere.

    Raises:
        ValueError: `w2_bits` with another scheme than int4.
    """

    scheme: Scheme
    block: Annotated[int, Meta(ge=0)] = 0
    symmetric: bool = False
    backend: Literal["direct", "optimum"] = "direct"
    calibration: Calibration | UnsetType = UNSET
    w2_bits: Literal[8] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.w2_bits and self.scheme != "int4":
            raise ValueError(f"w2_bits is for int4, not {self.scheme}")

    def of_matrix(self, matrix: str) -> "Quantisation":
        """How `w1`, `w3` or `w2` is stored: as all of them, or w2 as int8 if it has 8 bits."""
        if matrix == "w2" and self.w2_bits:
            return msgspec.structs.replace(self, scheme="int8", w2_bits=UNSET)
        return self

    def __str__(self) -> str:
        block = f" b{self.block}" if self.block else ""
        symmetric = " symmetric" if self.symmetric and self.block else ""
        via = "" if self.backend == "direct" else f" via {self.backend}"
        w2 = f" w2-int{self.w2_bits}" if self.w2_bits else ""
        calibrated = " calibrated" if self.calibration else ""
        return f"{self.scheme}{block}{symmetric}{w2}{via}{calibrated}"


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


class ExpertEntry(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One exported expert, or one slice of it, which is an expert of a smaller inner size.

    Attributes:
        slice, slices: which of how many slices, from 0. Written only if there are several.
        files: the `.onnx` graph first, then its weights.
        probe_output: base64 of the output for `wire.probe.probe_input(hidden)`, in fp16 and folded
            (`wire.probe.encode_probe_output`), as computed by onnxruntime on the exporting machine.
        error: ‖exported − fp32‖ / ‖fp32‖ of outputs for Gaussian inputs.
        source_sha256: SHA-256 of the source's raw bytes of w1, w3 and w2, in this order, each followed by its bias. Of
            a slice, its rows of w1 and w3, and all of w2.

    Raises:
        ValueError: there is no such slice.
    """

    layer: Annotated[int, Meta(ge=0)]
    expert: Annotated[int, Meta(ge=0)]
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1)]
    probe_output: str
    error: float
    source_sha256: Sha256
    slice: Annotated[int, Meta(ge=0)] = 0
    slices: Positive = 1

    def __post_init__(self) -> None:
        if self.slice >= self.slices:
            raise ValueError(f"slice {self.slice} of {self.slices}: slices are counted from 0")

    @property
    def id(self) -> UnitId:
        """Layer and unit number."""
        return UnitId(self.layer, self.expert * self.slices + self.slice)

    @property
    def name(self) -> str:
        """The unit for people, such as `L04:E3`, or `L04:E3/0` for a slice."""
        return unit_name(self.id, self.slices)

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
        schema: version of the format, `SCHEMA`; files of schema 1 are brought up to it as they are read.
        dims: with the number of slices of each expert.
        experts: one entry per expert, or per slice.
        architecture: of the model.
        probe_tolerance: largest relative error of a probe output on a healthy device.
        tools: versions of the software that made the bundle.
        draft: files of a draft model (`wire.draft`), if the bundle brings one.

    Raises:
        ValueError: `architecture` has another number of layers than `dims`, or an entry another number of slices.
    """

    schema: int
    source: Source
    dims: Dims
    quantisation: Quantisation
    probe_tolerance: float
    experts: tuple[ExpertEntry, ...]
    trunk: tuple[FileEntry, ...]
    tools: dict[str, str]
    architecture: Architecture
    draft: tuple[FileEntry, ...] = ()

    def __post_init__(self) -> None:
        if len(self.architecture.layers) != self.dims.layers:
            raise ValueError(f"{self.dims.layers} layers with experts, {len(self.architecture.layers)} are named")
        if any(entry.slices != self.dims.slices for entry in self.experts):
            raise ValueError(f"an expert is not cut into {self.dims.slices} slices, as `dims` says")

    @property
    def model_sha256(self) -> str:
        """Hash of source and dims: equal for bundles of one model, whatever their quantisation and slices."""
        whole = self.dims if self.dims.slices == 1 else msgspec.structs.replace(self.dims, slices=1)
        return hashlib.sha256(msgspec.json.encode([self.source, whole])).hexdigest()

    def entries(self, ids: Iterable[UnitId]) -> list[ExpertEntry]:
        """Entries of these units.

        Raises:
            BundleError: the bundle was exported without one of them.
        """
        by_id = {entry.id: entry for entry in self.experts}
        missing = [unit_name(i, self.dims.slices) for i in ids if i not in by_id]
        if missing:
            raise BundleError(
                f"the bundle has no expert {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}: "
                "export it or choose others"
            )
        return [by_id[i] for i in ids]


def load_manifest(bundle: Path) -> Manifest:
    """Read and check `manifest.json` of a bundle folder.

    Raises:
        BundleError: there is no manifest, or it is not a valid one of a readable schema version.
    """
    return decode_manifest(read_manifest(bundle), bundle)


def check_bundle_path(bundle: Path) -> None:
    """Check that onnxruntime and safetensors can open files in this folder: they take paths in UTF-8 only.

    Raises:
        BundleError: they can't.
    """
    if str(bundle).encode(errors="replace").decode() != str(bundle):
        raise BundleError(f"{bundle}: the path of a bundle must be UTF-8, or its models can't be opened: rename it")


def read_manifest(bundle: Path) -> bytes:
    """The bytes of `manifest.json` in a bundle folder, at most `MAX_MANIFEST_BYTES`.

    Raises:
        BundleError: there is no manifest, or it is too large, or no library could open models at this path.
    """
    check_bundle_path(bundle)
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
        BundleError: it is not a valid manifest of a readable schema version.
    """
    path = bundle / MANIFEST_NAME
    try:
        schema = decode_json(raw, _SchemaOnly).schema
        if schema not in READABLE_SCHEMAS:
            raise BundleError(
                f"{path} has schema {schema}, this version reads {' and '.join(map(str, READABLE_SCHEMAS))}: "
                "make the bundle again with 'wdmoe-export bundle'"
            )
        return decode_json(raw, Manifest) if schema == SCHEMA else _from_schema_1(raw)
    except msgspec.DecodeError as error:
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


def _from_schema_1(raw: bytes) -> Manifest:
    """The manifest in a file of schema 1, which says nothing about the architecture."""
    fields = decode_json(raw, dict[str, Any])
    if "architecture" in fields:
        raise msgspec.ValidationError("schema 1 has no `architecture`")
    layers = msgspec.convert(fields.get("dims"), Dims).layers
    return msgspec.convert({**fields, "schema": SCHEMA, "architecture": mixtral_architecture(layers)}, Manifest)


class _SchemaOnly(Struct):
    schema: int
