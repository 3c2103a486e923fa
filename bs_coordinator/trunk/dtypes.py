"""torch's types for the names that users give."""

import torch

from bs_coordinator.config import TrunkDtype

TORCH_DTYPE: dict[TrunkDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
