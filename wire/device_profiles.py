"""Kinds of devices, and what suits each: quantisation for the exporter, threads and provider for a node.

Thread limits and providers were not measured on these boards; docs/devices.md gives the source of each.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    # wire.manifest needs numpy (15 MiB), which the telemetry process does without.
    from wire.manifest import Scheme

DeviceName = Literal["pi4", "pi5", "jetson-orin", "generic-arm64", "x86"]
Provider = Literal["cpu", "cuda", "tensorrt"]
"""Execution provider of onnxruntime."""


class DeviceProfile(NamedTuple):
    """What suits a kind of device.

    Attributes:
        scheme: recommended quantisation.
        reason: why, for messages.
        most_threads: more threads do not help; None for one per (fast) core.
        providers: to be tried in this order; the last is always the CPU.
    """

    scheme: "Scheme"
    reason: str
    most_threads: int | None
    providers: tuple[Provider, ...]


PROFILES: dict[DeviceName, DeviceProfile] = {
    "pi4": DeviceProfile(
        "int8-dynamic", "its cores lack the dot-product instructions that make 4-bit kernels fast", 4, ("cpu",)
    ),
    "pi5": DeviceProfile("int4", "one token is bound by memory bandwidth, and its cores have dot product", 4, ("cpu",)),
    "jetson-orin": DeviceProfile("int4", "smallest in RAM; its CPU has dot product", 6, ("cuda", "cpu")),
    "generic-arm64": DeviceProfile("int4", "most 64-bit Arm cores of today have dot product", None, ("cpu",)),
    "x86": DeviceProfile("int4", "one token is bound by memory bandwidth", None, ("cpu",)),
}
