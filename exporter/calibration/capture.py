"""Runs a model on a calibration text and keeps what each layer's experts get as input.

The trunk is the bundle's, run by transformers' own model. All windows of the text go through a layer together, and each
expert's weights are read from the checkpoint when its tokens are there: once in all, one expert at a time.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.logging import disable_progress_bar

from common.errors import WdmoeError, one_line
from exporter.checkpoint.checkpoint import Checkpoint
from exporter.checkpoint.matrices import ExpertTensors, MatrixRef
from exporter.checkpoint.safetensors_file import TensorReader
from exporter.checkpoint.slabs import stream_rows
from exporter.errors import CheckpointError
from exporter.expert.activations import gated
from exporter.expert.layer_inputs import LayerInputs, save_layer
from wire.experts import ExpertId
from wire.manifest import ExpertGraph
from wire.tensors import Array

_IMPLEMENTATION = "wdmoe-calibration"
"""Name under which transformers knows the function that computes and records experts."""


class _LastLayerError(Exception):
    """The inputs of the last layer's experts are there: nothing after them is needed."""


def capture(
    source: Checkpoint, trunk: Path, windows: list[list[int]], out: Path, progress: Callable[[int, int], None]
) -> None:
    """Write the inputs of all experts on a text, one file per layer with experts (`layer_inputs.save_layer`).

    Args:
        source: the checkpoint, from which experts are read.
        trunk: the `trunk/` folder of the bundle.
        windows: token ids of pieces of text, all of one length.
        out: an existing folder for the files.
        progress: called with the number of finished layers and of all layers.

    Raises:
        CheckpointError: transformers can't run this model without its experts, or a tensor can't be read.
        StorageError: a file can't be written.
    """
    modules: list[nn.Module] = []
    layers = len(source.architecture.layers)

    def experts(module: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        layer = modules.index(module)
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, weights = chosen.reshape(len(flat), -1), weights.reshape(len(flat), -1)
        inputs = LayerInputs(flat.numpy(), chosen.to(torch.int32).numpy(), weights.float().numpy())
        save_layer(out, layer, inputs)
        progress(layer + 1, layers)
        if layer + 1 == layers:
            raise _LastLayerError
        return _sum(source, layer, flat, chosen, weights).view(hidden.shape)

    with torch.inference_mode(), _registered(experts):
        try:
            model = _load(trunk)
            modules += [module for module in model.modules() if _has_experts(module)]
            model.base_model(input_ids=torch.tensor(windows), use_cache=False)
        except _LastLayerError:
            return
        except WdmoeError:
            raise
        except Exception as error:  # noqa: BLE001 - transformers raises anything
            raise CheckpointError(
                f"can't calibrate {source.folder}: transformers failed ({type(error).__name__}: {one_line(error)}): "
                "leave out --calibrate"
            ) from None
    raise CheckpointError(
        f"can't calibrate {source.folder}: transformers' model has {len(modules)} layers with experts, not {layers}: "
        "leave out --calibrate"
    )


def _sum(source: Checkpoint, layer: int, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs, [tokens, hidden]."""
    total = torch.zeros_like(hidden)
    for expert in sorted(set(chosen.flatten().tolist()) & set(range(source.dims.experts))):
        rows, place = torch.where(chosen == expert)
        output = expert_output(source.experts[ExpertId(layer, expert)], source.architecture.expert, hidden[rows])
        total.index_add_(0, rows, output * weights[rows, place, None])
    return total


def expert_output(tensors: ExpertTensors, graph: ExpertGraph, x: Tensor) -> Tensor:
    """The output of one expert, read from the checkpoint, for float32 [tokens, hidden]."""
    with TensorReader() as reader:

        def product(x: Tensor, matrix: MatrixRef, bias: MatrixRef | None) -> Tensor:
            y = x @ torch.from_numpy(read_matrix(reader, matrix)).T
            return y if bias is None else y + torch.from_numpy(read_matrix(reader, bias)[:, 0])

        gate, up = product(x, tensors.w1, tensors.b1), product(x, tensors.w3, tensors.b3)
        inner = torch.from_numpy(gated(graph, gate.numpy(), up.numpy()))
        return product(inner, tensors.w2, tensors.b2)


def read_matrix(reader: TensorReader, matrix: MatrixRef) -> Array:
    """A matrix, float32 [rows, columns]."""
    values = np.empty(matrix.shape, np.float32)
    for first, slab in stream_rows(reader, matrix, hashlib.sha256()):
        values[first : first + len(slab)] = slab
    return values


def _load(folder: Path) -> Any:
    """transformers' model of a `trunk/` folder in fp32, without the weights of its experts."""
    disable_progress_bar()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, experts_implementation=_IMPLEMENTATION, trust_remote_code=False
        )
    for module in model.modules():
        if _has_experts(module):
            for part in module.modules():
                part._parameters.clear()
                part._buffers.clear()
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        convert_and_load_state_dict_in_model(
            model,
            {name: tensors.get_slice(name) for name in tensors.keys()},  # noqa: SIM118 - not a dict
            LoadStateDictConfig(
                device_map={"": torch.device("cpu")},
                dtype=torch.float32,
                dtype_plan=model._get_dtype_plan(torch.float32),
                weight_mapping=get_model_conversion_mapping(model),
            ),
            None,
        )
    model.tie_weights()
    if lacking := sorted(name for name, value in model.state_dict().items() if value.is_meta):
        raise ValueError(f"the trunk lacks {lacking[0]}")
    return model.requires_grad_(False).eval()


def _has_experts(module: nn.Module) -> bool:
    """Whether transformers asks the registered function for the output of this module."""
    return "_is_expert_parallel" in vars(module)


@contextmanager
def _registered(experts: Callable[..., Tensor]) -> Iterator[None]:
    ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION] = experts
    try:
        yield
    finally:
        del ALL_EXPERTS_FUNCTIONS[_IMPLEMENTATION]
