"""How much the outputs of a layer's experts differ: a table that is measured once per model."""

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Struct

from common.files import atomic_write
from wire.manifest import Sha256
from wire.tensors import Array

SCHEMA = 1
Difference = Annotated[float, Meta(ge=0)]


class DifferenceDocument(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table as it is stored (JSON).

    Attributes:
        schema: version of this document.
        model_sha256: `Manifest.model_sha256` of the model it was measured on.
        text_sha256: SHA-256 of the file with the texts.
        tokens: number of hidden states measured in each layer.
        rows: [layers][experts], number of hidden states that the gate routed to each expert.
        differences: [layers][experts][experts], the values of `DifferenceTable`.
    """

    schema: int
    model_sha256: Sha256
    text_sha256: Sha256
    tokens: int
    rows: list[list[int]]
    differences: list[list[list[Difference]]]


class DifferenceTable:
    """The error of replacing one expert by another.

    Attributes:
        model_sha256: of the model.
        values: float32 [layers, experts, experts]; [l, a, b] is the mean of ‖E_a(x) − E_b(x)‖ / ‖E_a(x)‖ over
            hidden states x that layer l's gate routed to a.
        or_skipped: float32 [layers, experts, experts + 1], the same with 0 on the diagonal, and a last column of 1 for
            skipping the expert.
    """

    # Not a dataclass: msgspec would then decode it itself instead of calling the registry's hook.
    def __init__(self, model_sha256: str, values: Array) -> None:
        self.model_sha256 = model_sha256
        self.values = values
        layers, experts, _ = values.shape
        self.or_skipped = np.concatenate([values, np.ones((layers, experts, 1), np.float32)], axis=2)
        self.or_skipped[:, np.arange(experts), np.arange(experts)] = 0


def read_differences(path: Path) -> DifferenceTable:
    """Read and check a table.

    Raises:
        ValueError: the file is missing, or is not a table of expert differences.
    """
    try:
        document = msgspec.json.decode(path.read_bytes(), type=DifferenceDocument)
    except OSError as error:
        raise ValueError(f"can't read {path}: {error.strerror} (make it with 'wdmoe-testbed differences')") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table of expert differences: {error}") from None
    if document.schema != SCHEMA:
        raise ValueError(f"{path} has schema {document.schema}, this version reads {SCHEMA}: measure it again")
    try:
        values = np.array(document.differences, np.float32)
    except ValueError:
        values = np.empty(0, np.float32)
    if values.ndim != 3 or values.shape[1] != values.shape[2] or not np.isfinite(values).all():
        raise ValueError(f"{path} is not a table of expert differences: it is not [layers][experts][experts]")
    values.flags.writeable = False
    return DifferenceTable(document.model_sha256, values)


def write_differences(document: DifferenceDocument, path: Path) -> None:
    """Write a table.

    Raises:
        StorageError: the file can't be written.
    """
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(document))
