"""How a checkpoint is exported. The options of `wdmoe-export bundle` are made from this class."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from common.config import Config, Option
from common.cores import usable_cores
from wire.device_profiles import DeviceName
from wire.manifest import Scheme

_MOST_JOBS = 4
"""More wait for the disk."""


@dataclass(frozen=True, slots=True)
class ExportConfig(Config):
    """Quantisation and experts."""

    quant: Annotated[Scheme | None, Option("Quantisation of the experts.  [default: the device's, else int4]")] = None
    device: Annotated[DeviceName | None, Option("Kind of device to choose the quantisation for.")] = None
    block: Annotated[
        Literal[32, 64, 128] | None, Option("Weights that share a scale, for int4 and int8.  [default: 32]")
    ] = None
    w2_bits: Annotated[
        Literal[4, 8] | None,
        Option("Bits of int4 experts' last matrix, w2; 8 means less error and a quarter more bytes.  [default: 4]"),
    ] = None
    calibrate: Annotated[
        Path | None,
        Option(
            "Text file (UTF-8, or .jsonl with 'text') for which the error of int4 or int8 experts is minimised: same "
            "size, better answers, but the whole model runs on it first.",
            exists=True, metavar="TEXT",
        ),
    ] = None  # fmt: skip
    calibration_tokens: Annotated[int, Option("Tokens of TEXT to use, at most.", minimum=512, maximum=1 << 20)] = 16384
    symmetric: Annotated[bool, Option("Quantise without zero points: smaller, less exact.")] = False
    via: Annotated[
        Literal["direct", "optimum"],
        Option("Quantiser; optimum makes int8-dynamic and needs an environment of its own."),
    ] = "direct"
    layers: Annotated[str, Option("Layers to export, such as 0-3,7; only layers with experts are counted.")] = "*"
    experts: Annotated[str, Option("Experts of each layer to export, such as 0,2.")] = "*"
    slices: Annotated[
        int,
        Option("Slices to cut each expert into, which different nodes can hold and compute at once.", minimum=1,
               maximum=64),
    ] = 1  # fmt: skip
    jobs: Annotated[int, Option("Processes to use, at most; fewer if RAM is short.", minimum=1, maximum=64)] = field(
        default_factory=lambda: min(_MOST_JOBS, usable_cores())
    )
