"""Loading the trunk of a bundle, whatever its family."""

from pathlib import Path

import torch

from bs_coordinator.config import TrunkDtype
from bs_coordinator.errors import TrunkError
from bs_coordinator.trunk.interface import Trunk
from bs_coordinator.trunk.llama import LlamaTrunk


def load_trunk(folder: Path, *, device: str = "cpu", dtype: TrunkDtype = "fp32") -> Trunk:
    """Load the `trunk/` folder of a bundle.

    Args:
        folder: with `config.json` and `model.safetensors`.
        device: as torch names it.
        dtype: of the weights and of the arithmetic.

    Raises:
        BundleError: files are missing or do not fit together.
    """
    return LlamaTrunk(folder, device=device, dtype=dtype)


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
