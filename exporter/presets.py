"""Which quantisation suits which device, and why, in words that the command line repeats."""

from typing import Literal, NamedTuple

from wire.manifest import Quantisation, Scheme

Device = Literal["pi4", "pi5", "jetson", "x86"]
DEFAULT_BLOCK = 32


class Preset(NamedTuple):
    """A choice and its reason."""

    scheme: Scheme
    reason: str


PRESETS: dict[Device, Preset] = {
    "pi4": Preset("int8-dynamic", "its cores lack the dot-product instructions that 4-bit kernels live on"),
    "pi5": Preset("int4", "one token is bound by memory bandwidth, and its cores have dot product"),
    "jetson": Preset("int4", "smallest in RAM; its CPU has dot product"),
    "x86": Preset("int4", "one token is bound by memory bandwidth"),
}


def choose_quantisation(
    device: Device | None, scheme: Scheme | None, block: int | None, symmetric: bool
) -> tuple[Quantisation, str]:
    """The quantisation that the options mean, and one line that says what was chosen and why.

    Raises:
        ValueError: options that don't go together.
    """
    preset = PRESETS[device] if device else None
    chosen = scheme or (preset.scheme if preset else "int4")
    blockwise = chosen in ("int4", "int8")
    if not blockwise and (block or symmetric):
        raise ValueError(f"--block and --symmetric have no meaning with --quant {chosen}")
    quantisation = Quantisation(scheme=chosen, block=(block or DEFAULT_BLOCK) if blockwise else 0, symmetric=symmetric)
    if preset and scheme is None:
        return quantisation, f"{quantisation} for {device}: {preset.reason}"
    return quantisation, f"{quantisation}" + ("" if scheme else " (the default; see --quant and --device)")
