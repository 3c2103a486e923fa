"""What checkpoints of each family of models with Mixtral's structure call things, by `model_type` in config.json."""

from pathlib import Path
from typing import Any, NamedTuple

from exporter.errors import CheckpointError


class Family(NamedTuple):
    """Names that families use differently.

    Attributes:
        block: a layer's module that holds the gate, `gate`, and the experts, `experts.0`, `experts.1`, ….
        w1, w3, w2: an expert's matrices, as `exporter.checkpoint.matrices.ExpertTensors` describes them.
        experts_key: key of config.json with the number of experts per layer.
        intermediate_key: key of config.json with an expert's intermediate size.
    """

    block: str
    w1: str
    w3: str
    w2: str
    experts_key: str
    intermediate_key: str


FAMILIES = {
    "mixtral": Family("block_sparse_moe", "w1", "w3", "w2", "num_local_experts", "intermediate_size"),
}


def model_family(folder: Path, config: dict[str, Any]) -> Family:
    """The family of a checkpoint.

    Args:
        folder: of the checkpoint, for the message.
        config: content of config.json.

    Raises:
        CheckpointError: the model is of none of the families.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else "model"
        raise CheckpointError(
            f"{folder} holds a {architecture} (model_type {kind!r}), not a Mixtral: "
            f"only model_type {' or '.join(map(repr, FAMILIES))} can be cut into experts"
        )
    return FAMILIES[kind]
