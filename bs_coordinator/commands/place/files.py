"""Files that `wdmoe-bs place` reads and writes: shapes of models, outputs of other commands, traffic, placements."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from common.csv_rows import read_rows
from common.errors import StorageError
from common.files import atomic_write
from common.jsonl import decode_json

if TYPE_CHECKING:
    from bs_coordinator.placement.shapes import ModelShape
    from wire.experts import UnitId
    from wire.manifest import Manifest
    from wire.tensors import Array

_MOST_TOKENS = 1 << 20
"""Tokens of a request in a latency.csv."""
T = TypeVar("T")


def read_shape(model: str) -> "ModelShape":
    """The shape of a model by its name, its config.json, or the folder of it.

    Raises:
        StorageError: the file can't be read, or is not the config.json of a mixture of experts.
    """
    from bs_coordinator.placement.shapes import NAMED, shape_of_config

    if model in NAMED:
        return shape_of_config(model, NAMED[model])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    try:
        return shape_of_config(path.resolve().parent.name, decode_json(path.read_bytes(), dict[str, Any]))
    except OSError as error:
        names = ", ".join(NAMED)
        raise StorageError(f"can't read {path}: {error.strerror}; --model takes {names} or a config.json") from None
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from None
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is not a model's config.json: {error}") from None


def read_traffic(path: Path | None, layers: int, experts: int) -> "Array":
    """Hidden states asked of each expert, plus one so that none weighs zero: float32 [layers, experts].

    Args:
        path: latency.csv of a run; None for equal traffic.

    Raises:
        StorageError: the file can't be read, or is no latency.csv of a model of this size.
    """
    import numpy as np

    counts = np.ones((layers, experts))
    if path is None:
        return counts.astype(np.float32)

    def take(row: dict[str, str]) -> None:
        layer, tokens = int(row["layer"]), int(row["tokens"])
        for expert in map(int, row["experts"].split()):
            if layer not in range(layers) or expert not in range(experts) or not 0 <= tokens <= _MOST_TOKENS:
                raise ValueError(
                    f"the model has {layers} layers of {experts} experts, a step at most {_MOST_TOKENS} tokens"
                )
            counts[layer, expert] += tokens

    try:
        read_rows(path, ("layer", "experts", "tokens"), take)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise StorageError(f"{path} is not a latency.csv of this model: {error}") from None
    return counts.astype(np.float32)


def read_output(path: Path, kind: type[T], made_by: str) -> T:
    """The output of another command.

    Raises:
        StorageError: the file can't be read, or is not such an output.
    """
    try:
        return decode_json(path.read_bytes(), kind)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is not the output of '{made_by}': {error}") from None


def read_placement(path: Path, manifest: "Manifest") -> "Mapping[str, tuple[UnitId, ...]]":
    """The units of each node, from a file of `write_placement`.

    Raises:
        StorageError: the file can't be read, or is not a placement of this model.
    """
    from wire.experts import parse_selector

    try:
        selectors = decode_json(path.read_bytes(), dict[str, str])
        dims = manifest.dims
        return {
            name: parse_selector(text, layers=dims.layers, experts=dims.experts, slices=dims.slices)
            for name, text in selectors.items()
        }
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise StorageError(f"{path} is not a placement of this model: {error}") from None


def write_placement(path: Path, selectors: Mapping[str, str]) -> None:
    """Write which experts each node holds."""
    with atomic_write(path) as file:
        file.write(msgspec.json.format(msgspec.json.encode(selectors)))
