"""How large a bundle will be, from the checkpoint's config.json alone: before its weights are downloaded."""

from pathlib import Path

from common.disk_space import Room
from exporter.checkpoint.model_config import read_model_config
from exporter.checkpoint.survey import survey
from exporter.expert.graph import plan_layout
from wire.experts import parse_index_set
from wire.manifest import Quantisation

_SOURCE_BYTES = {None: 2.0, "mxfp4": 17 / 32, "fp8": 1.0}
"""Bytes per weight of experts by `quant_method`: nearly always BF16. With F32, the forecast is too high by the experts'
size."""


def forecast_room(
    folder: Path, out: Path, quantisation: Quantisation, *, layers: str, experts: str, weight_bytes: int
) -> Room:
    """The room that a bundle of a checkpoint will need.

    Args:
        folder: of the checkpoint; only config.json is read.
        layers, experts: index sets, such as `0-3,7` or `*`.
        weight_bytes: size of all weights of the checkpoint.

    Raises:
        CheckpointError: the model can't be exported.
        ValueError: an index set is wrong.
    """
    config = read_model_config(folder)
    found = survey(folder, config.kind, None)
    dims = found.dims
    chosen = len(parse_index_set(layers, dims.layers)) * len(parse_index_set(experts, dims.experts))
    in_experts = 3 * dims.hidden * dims.intermediate * dims.layers * dims.experts * _SOURCE_BYTES[config.quantised]
    trunk = max(0, weight_bytes - int(in_experts))
    return Room(out, trunk + chosen * plan_layout(dims, quantisation, found.architecture.expert).bytes, "the bundle")
