"""Chooses the quantisation for a device, with the reason for messages."""

from typing import Literal

from msgspec import UNSET

from wire.device_profiles import PROFILES, DeviceName
from wire.manifest import Quantisation, Scheme

DEFAULT_BLOCK = 32


def choose_quantisation(
    device: DeviceName | None, scheme: Scheme | None, block: int | None, symmetric: bool,
    w2_bits: Literal[4, 8] | None = None,
) -> tuple[Quantisation, str]:  # fmt: skip
    """The quantisation that the options ask for, and one line about the choice and its reason.

    Raises:
        ValueError: the options contradict each other.
    """
    preset = PROFILES[device] if device else None
    chosen = scheme or (preset.scheme if preset else "int4")
    blockwise = chosen in ("int4", "int8")
    if not blockwise and (block or symmetric):
        raise ValueError(f"--block and --symmetric don't apply to --quant {chosen}")
    if w2_bits and chosen != "int4":
        raise ValueError(f"--w2-bits is for --quant int4, not {chosen}")
    if w2_bits == 8 and preset and preset.scheme == "int8-dynamic":
        raise ValueError(f"--w2-bits 8 does not suit {device}: {preset.reason}; use --quant {preset.scheme}")
    quantisation = Quantisation(
        scheme=chosen, block=(block or DEFAULT_BLOCK) if blockwise else 0, symmetric=symmetric,
        w2_bits=8 if w2_bits == 8 else UNSET,
    )  # fmt: skip
    if preset and scheme is None:
        return quantisation, f"{quantisation} for {device}: {preset.reason}"
    return quantisation, f"{quantisation}" + ("" if scheme else " (the default; see --quant and --device)")
