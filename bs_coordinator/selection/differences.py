"""How much the experts of a layer differ in their outputs: a table measured once per model."""

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
        model_sha256: `Manifest.model_sha256` of the model it was measured on.
        text_sha256: of the file with the texts.
        tokens: hidden states of each layer that were measured.
        rows: [layers][experts], hidden states that the gate routed to each expert.
        differences: [layers][experts][experts], see `DifferenceTable.values`.
    """

    schema: int
    model_sha256: Sha256
    text_sha256: Sha256
    tokens: int
    rows: list[list[int]]
    differences: list[list[list[Difference]]]


class DifferenceTable:
    """What replacing one expert by another costs.

    Attributes:
        model_sha256: of the model that it is about.
        values: float32 [layers, experts, experts]; [l, a, b] is the mean of ‖E_a(x) − E_b(x)‖ / ‖E_a(x)‖ over
            hidden states x that layer l's gate routed to a.
        or_nobody: float32 [layers, experts, experts + 1], the same with 0 for an expert itself, and in the last column
            1 for nobody in its place.
    """

    # Not a dataclass: msgspec would then read it from a document instead of leaving it to the registry.
    def __init__(self, model_sha256: str, values: Array) -> None:
        self.model_sha256 = model_sha256
        self.values = values
        layers, experts, _ = values.shape
        self.or_nobody = np.concatenate([values, np.ones((layers, experts, 1), np.float32)], axis=2)
        self.or_nobody[:, np.arange(experts), np.arange(experts)] = 0


def read_differences(path: Path) -> DifferenceTable:
    """Read and check a table.

    Raises:
        ValueError: the file is missing or not such a table.
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
    """Store a table.

    Raises:
        StorageError: the file could not be written.
    """
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(document))
