"""How much the outputs of a layer's experts differ, and which must never be dropped: measured once per model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from common.files import atomic_write
from common.jsonl import decode_json
from wire.manifest import Sha256
from wire.tensors import Array

SCHEMA = 2
Difference = Annotated[float, Meta(ge=0)]
Index = Annotated[int, Meta(ge=0)]


class _Schema(Struct):
    schema: int


class DifferenceDocument(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table as it is stored (JSON).

    Attributes:
        schema: version of this document.
        model_sha256: `Manifest.model_sha256` of the model it was measured on.
        text_sha256: SHA-256 of the file with the texts.
        tokens: number of hidden states measured in each layer.
        rows: [layers][experts], number of hidden states that the gate routed to each expert.
        differences: [layers][experts][experts], the values of `DifferenceTable`.
        peaks: [layers][experts], largest magnitude in the outputs of each expert for its own rows, before weighting.
        super_experts: (layer, expert) of those that must not be dropped (`testbed.evaluation.differences`).
    """

    schema: int
    model_sha256: Sha256
    text_sha256: Sha256
    tokens: int
    rows: list[list[int]]
    differences: list[list[list[Difference]]]
    peaks: list[list[Difference]]
    super_experts: list[tuple[Index, Index]]


class DifferenceTable:
    """The error of replacing one expert by another.

    Attributes:
        model_sha256: of the model.
        values: float32 [layers, experts, experts]; [l, a, b] is the mean of ‖E_a(x) − E_b(x)‖ / ‖E_a(x)‖ over
            hidden states x that layer l's gate routed to a.
        or_skipped: float32 [layers, experts, experts + 1], the same with 0 on the diagonal, and a last column of 1 for
            skipping the expert.
        nearest: intp [layers, experts, experts - 1], the other experts, the most similar first.
        super_experts: bool [layers, experts], experts that must never be dropped.
    """

    # Not a dataclass: msgspec would then decode it itself instead of calling the registry's hook.
    def __init__(self, model_sha256: str, values: Array, super_experts: Sequence[tuple[int, int]] = ()) -> None:
        self.model_sha256 = model_sha256
        self.values = values
        layers, experts, _ = values.shape
        self.or_skipped = np.concatenate([values, np.ones((layers, experts, 1), np.float32)], axis=2)
        self.or_skipped[:, np.arange(experts), np.arange(experts)] = 0
        alike = values.copy()
        alike[:, np.arange(experts), np.arange(experts)] = -1
        self.nearest = np.argsort(alike, axis=2, kind="stable")[:, :, 1:]
        self.super_experts = np.zeros((layers, experts), np.bool_)
        for layer, expert in super_experts:
            self.super_experts[layer, expert] = True

    def super_experts_of(self, layer: int, experts: int) -> NDArray[np.bool_]:
        """bool [experts], which experts of a layer must never be dropped.

        Raises:
            ValueError: the table does not fit the layer or the number of experts.
        """
        if layer >= len(self.values) or self.values.shape[1] != experts:
            raise ValueError(f"the table of expert differences does not fit layer {layer} of {experts} experts")
        kept: NDArray[np.bool_] = self.super_experts[layer]
        return kept


def read_differences(path: Path) -> DifferenceTable:
    """Read and check a table.

    Raises:
        ValueError: the file is missing, or is not a table of expert differences.
    """
    try:
        data = path.read_bytes()
        schema = decode_json(data, _Schema).schema
        if schema != SCHEMA:
            raise ValueError(
                f"{path} has schema {schema}, this version reads {SCHEMA}: "
                "make a new one with 'wdmoe-testbed differences'"
            )
        document = decode_json(data, DifferenceDocument)
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror} (make it with 'wdmoe-testbed differences')") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a table of expert differences: {error}") from None
    try:
        values = np.array(document.differences, np.float32)
    except ValueError:
        values = np.empty(0, np.float32)
    if values.ndim != 3 or values.shape[1] != values.shape[2] or not np.isfinite(values).all():
        raise ValueError(f"{path} is not a table of expert differences: it is not [layers][experts][experts]")
    values.flags.writeable = False
    if any(layer >= len(values) or expert >= values.shape[1] for layer, expert in document.super_experts):
        raise ValueError(
            f"{path} is not a table of expert differences: it names an expert that the model does not have"
        )
    return DifferenceTable(document.model_sha256, values, document.super_experts)


def write_differences(document: DifferenceDocument, path: Path) -> None:
    """Write a table.

    Raises:
        StorageError: the file can't be written.
    """
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(document))
