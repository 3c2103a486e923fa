"""transformers' own model without the weights of its experts."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from bs_coordinator.config import TrunkQuantisation
from bs_coordinator.errors import TrunkError
from bs_coordinator.trunk.forward_pass import EXPERTS_IMPLEMENTATION
from bs_coordinator.trunk.quantised import quantise_linears
from common.errors import one_line
from wire.errors import BundleError

log = logging.getLogger(__name__)


def load_model(
    folder: Path, *, device: torch.device, dtype: torch.dtype, quantisation: TrunkQuantisation = "none"
) -> Any:
    """transformers' model of a `trunk/` folder, whose experts must be asked elsewhere (`forward_pass`).

    Tensors go from the file to the device one by one; the weights of experts never exist.

    Raises:
        BundleError: files are missing or do not fit together.
        TrunkError: transformers can't build this model, or not without its experts.
    """
    with _one_line(f"transformers can't build the model that {folder / 'config.json'} describes", TrunkError):
        model = _empty_model(folder, dtype)
    quantise_linears(model, quantisation)
    file = folder / "model.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors, _one_line(f"can't load {file}", BundleError), _no_bar():
            info, _ = convert_and_load_state_dict_in_model(
                model,
                {name: tensors.get_slice(name) for name in tensors.keys()},  # noqa: SIM118 - not a dict
                LoadStateDictConfig(
                    device_map={"": device},
                    dtype=dtype,
                    dtype_plan=model._get_dtype_plan(dtype),
                    weight_mapping=get_model_conversion_mapping(model),
                ),
                None,
            )
    except (OSError, SafetensorError) as error:
        raise BundleError(f"can't read {file}: {one_line(error)}") from None
    model.tie_weights()
    lacking = sorted(name for name, value in model.state_dict().items() if value.is_meta)
    wrong = sorted(name for name, *_ in info.mismatched_keys) or lacking or sorted(info.conversion_errors)
    if wrong:
        raise BundleError(
            f"{folder} does not hold the trunk that its config.json describes: {wrong[0]}"
            + (f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else "")
        )
    if info.unexpected_keys:
        log.debug("tensors of %s that the model does not use: %s", file, ", ".join(sorted(info.unexpected_keys)))
    return model.requires_grad_(False).to(device).eval()


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers' registered functions compute, layer by layer."""
    return [module for module in model.modules() if "_is_expert_parallel" in vars(module)]


def _empty_model(folder: Path, dtype: torch.dtype) -> Any:
    # A deep copy: configs share parts with what else was made from them, and the implementation is set in them.
    # Code of a checkpoint is never run; by default the library asks on the terminal whether it may.
    config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    # The exporter has dequantised what belongs to the trunk.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation=EXPERTS_IMPLEMENTATION, trust_remote_code=False
        )
    modules = expert_modules(model)
    if not modules:
        raise TrunkError(f"transformers' {type(model).__name__} has no experts that can be computed elsewhere")
    for module in modules:
        for part in module.modules():
            part._parameters.clear()
            part._buffers.clear()
    return model


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the library's progress bar: loading takes seconds."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _one_line(what: str, kind: type[TrunkError] | type[BundleError]) -> Iterator[None]:
    """Errors of libraries as one line with the library's reason."""
    try:
        yield
    except (TrunkError, BundleError, OSError, SafetensorError):
        raise
    except Exception as error:
        raise kind(f"{what}: {type(error).__name__}: {one_line(error)}") from error
