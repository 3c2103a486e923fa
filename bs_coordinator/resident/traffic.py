"""Counts of which experts tokens are sent to, alone and in pairs: kept in a file, and halved as they grow old."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from common.csv_rows import read_rows
from common.errors import StorageError
from common.files import atomic_write
from common.jsonl import decode_json
from wire.manifest import Dims, Sha256
from wire.tensors import Array

log = logging.getLogger(__name__)

SCHEMA = 1
HALVED_AT = 50_000
"""Tokens of a layer at which its counts are halved, so that recent prompts outweigh those of last week."""


class TrafficDocument(Struct, frozen=True, kw_only=True):
    """The content of the file.

    Attributes:
        model_sha256: `Manifest.model_sha256`.
        pairs: as `Traffic.pairs`.
    """

    schema: int
    model_sha256: Sha256
    pairs: list[list[list[float]]]


class Traffic:
    """Counts of one model's tokens.

    Attributes:
        pairs: float64 [layers, experts, experts], tokens sent to both experts; on the diagonal, to that expert.
    """

    def __init__(self, dims: Dims) -> None:
        self.pairs: NDArray[np.float64] = np.zeros((dims.layers, dims.experts, dims.experts))

    def observe(self, layer: int, gate: Array) -> None:
        """Count gate weights, float32 [tokens, experts], zero where an expert is not chosen."""
        chosen = (gate != 0).astype(np.float64)
        pairs = self.pairs[layer]
        pairs += chosen.T @ chosen
        if pairs.max() > HALVED_AT:
            pairs *= 0.5


def read_traffic(path: Path, dims: Dims, model_sha256: str) -> Traffic:
    """The counts of earlier runs; zeros if there is no file, or, with a warning, if it can't be used."""
    traffic = Traffic(dims)
    try:
        document = decode_json(path.read_bytes(), TrafficDocument)
        pairs = np.array(document.pairs, np.float64)
    except FileNotFoundError:
        return traffic
    except (OSError, ValueError, msgspec.DecodeError) as error:
        log.warning("%s can't be read (%s): counting experts' traffic from zero", path, error)
        return traffic
    right = document.schema == SCHEMA and document.model_sha256 == model_sha256 and pairs.shape == traffic.pairs.shape
    if not right or not (np.isfinite(pairs).all() and (pairs >= 0).all()):
        log.warning("%s is of another model or damaged: counting experts' traffic from zero", path)
        return traffic
    traffic.pairs[:] = pairs
    return traffic


def write_traffic(traffic: Traffic, path: Path, model_sha256: str) -> None:
    """Write the counts to a file.

    Raises:
        StorageError: they can't be written.
    """
    document = TrafficDocument(schema=SCHEMA, model_sha256=model_sha256, pairs=np.round(traffic.pairs, 1).tolist())
    with atomic_write(path) as file:
        file.write(msgspec.json.encode(document))


def traffic_of_log(path: Path, dims: Dims) -> Traffic:
    """Counts from the latency.csv of a run, from the requests of its one-token steps.

    Raises:
        StorageError: it can't be read, or is of another model.
    """
    chosen: dict[tuple[int, str, str, str, str], set[int]] = defaultdict(set)

    def take(row: dict[str, str]) -> None:
        if row["phase"] == "decode" and row.get("step_tokens", "1") == "1":
            layer, experts = int(row["layer"]), [int(expert) for expert in row["experts"].split()]
            if layer not in range(dims.layers) or not {*experts} <= {*range(dims.experts)}:
                raise ValueError(f"the model has {dims.layers} layers of {dims.experts} experts")
            chosen[layer, row.get("run", ""), row.get("cell", ""), row["answer"], row["token"]].update(experts)

    try:
        read_rows(path, ("phase", "answer", "token", "layer", "experts"), take)
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:
        raise StorageError(f"{path} is not a latency.csv of this model: {error}") from None
    traffic = Traffic(dims)
    for (layer, *_), experts in chosen.items():
        _count(traffic.pairs[layer], experts)
    return traffic


def _count(pairs: NDArray[np.float64], experts: Iterable[int]) -> None:
    for a, b in itertools.product(sorted(experts), repeat=2):
        pairs[a, b] += 1
