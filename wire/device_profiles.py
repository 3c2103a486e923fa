"""Kinds of devices, and what suits each: the exporter chooses a quantisation by it, a node its threads and provider.

The thread limits and providers were not measured on these boards; `docs/devices.md` says what each rests on.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    # wire.manifest needs numpy (15 MiB), which the telemetry process does without.
    from wire.manifest import Scheme

DeviceName = Literal["pi4", "pi5", "jetson-orin", "generic-arm64", "x86"]
Provider = Literal["cpu", "cuda", "tensorrt"]
"""What onnxruntime computes with."""


class DeviceProfile(NamedTuple):
    """What suits a kind of device.

    Attributes:
        scheme, reason: quantisation, and why, in words that command lines repeat.
        most_threads: more do not help; None for as many as there are (fast) cores.
        providers: to try in this order; the last is always the CPU.
    """

    scheme: "Scheme"
    reason: str
    most_threads: int | None
    providers: tuple[Provider, ...]


PROFILES: dict[DeviceName, DeviceProfile] = {
    "pi4": DeviceProfile(
        "int8-dynamic", "its cores lack the dot-product instructions that 4-bit kernels live on", 4, ("cpu",)
    ),
    "pi5": DeviceProfile("int4", "one token is bound by memory bandwidth, and its cores have dot product", 4, ("cpu",)),
    "jetson-orin": DeviceProfile("int4", "smallest in RAM; its CPU has dot product", 6, ("cuda", "cpu")),
    "generic-arm64": DeviceProfile("int4", "most 64-bit Arm cores of today have dot product", None, ("cpu",)),
    "x86": DeviceProfile("int4", "one token is bound by memory bandwidth", None, ("cpu",)),
}
