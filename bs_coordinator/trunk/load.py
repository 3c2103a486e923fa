"""Loading the trunk of a bundle, whatever its family."""

import json
import logging
from pathlib import Path

import torch

from bs_coordinator.config import TrunkDtype, TrunkQuantisation
from bs_coordinator.errors import TrunkError
from bs_coordinator.trunk.generic import GenericTrunk
from bs_coordinator.trunk.interface import Trunk
from bs_coordinator.trunk.llama import LlamaTrunk, why_not_llama
from wire.errors import BundleError

log = logging.getLogger(__name__)


def load_trunk(
    folder: Path, *, device: str = "cpu", dtype: TrunkDtype = "fp32", quantisation: TrunkQuantisation = "none"
) -> Trunk:
    """Load the `trunk/` folder of a bundle.

    Models with Llama's attention take this project's own blocks, which are faster, and exact where drafts need it.
    All others take transformers' own model.

    Args:
        folder: with `config.json` and `model.safetensors`.
        device: as torch names it.
        dtype: of the weights and of the arithmetic.
        quantisation: of the weights of linear layers, but for routers.

    Raises:
        BundleError: files are missing or do not fit together.
        TrunkError: transformers can't run this model without its experts, or its weights can't be quantised so.
    """
    config = _read_config(folder)
    family = config.get("model_type", "unknown")
    why_not = why_not_llama(config)
    if why_not:
        log.info("trunk of the family %s: transformers' own model, because %s", family, why_not)
        return GenericTrunk(folder, device=device, dtype=dtype, quantisation=quantisation)
    log.info("trunk of the family %s: own blocks", family)
    return LlamaTrunk(folder, device=device, dtype=dtype, quantisation=quantisation)


def check_device(name: str) -> None:
    """Check that a trunk can run on a device, named as torch names it.

    Raises:
        TrunkError: the name is invalid, the trunk does not run on such a device, or this machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise TrunkError(f"--device {name}: choose cpu, cuda or one GPU such as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrunkError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs here; use --device cpu")


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    if not path.is_file():
        raise BundleError(f"{folder} has no config.json: this bundle holds experts only, use the exporter's own")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(f"can't read {path}: {error}") from None
    if not isinstance(config, dict):
        raise BundleError(f"{path} is not a JSON object")
    return config
