"""Which quantisation suits which device, and why, in words that the command line repeats."""

from wire.device_profiles import PROFILES, DeviceName
from wire.manifest import Quantisation, Scheme

DEFAULT_BLOCK = 32


def choose_quantisation(
    device: DeviceName | None, scheme: Scheme | None, block: int | None, symmetric: bool
) -> tuple[Quantisation, str]:
    """The quantisation that the options mean, and one line that says what was chosen and why.

    Raises:
        ValueError: options that don't go together.
    """
    preset = PROFILES[device] if device else None
    chosen = scheme or (preset.scheme if preset else "int4")
    blockwise = chosen in ("int4", "int8")
    if not blockwise and (block or symmetric):
        raise ValueError(f"--block and --symmetric have no meaning with --quant {chosen}")
    quantisation = Quantisation(scheme=chosen, block=(block or DEFAULT_BLOCK) if blockwise else 0, symmetric=symmetric)
    if preset and scheme is None:
        return quantisation, f"{quantisation} for {device}: {preset.reason}"
    return quantisation, f"{quantisation}" + ("" if scheme else " (the default; see --quant and --device)")
