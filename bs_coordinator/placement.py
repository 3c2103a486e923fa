"""Which device should hold which experts: a plan for starting nodes. Pure.

Within a layer the answers of all asked devices are waited for, so that traffic is balanced layer by layer: every
expert goes to the device that would be done first with its share of that layer's traffic.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from bs_coordinator.errors import PlacementError
from wire.experts import ExpertId
from wire.tensors import Array

HYSTERESIS = 0.25
"""How much sooner another device must be done before an expert is moved there: moving costs its bytes over the air."""


class Device(Struct, frozen=True):
    """What a plan needs to know of a device.

    Attributes:
        experts: how many fit into its RAM.
        row_ms: time of one hidden state there, through an expert, and back (`wdmoe-bs links`).
    """

    name: str
    experts: int
    row_ms: float = 1.0


class Placement(Struct, frozen=True):
    """Experts by device, in their order, and why.

    Attributes:
        load: share of all traffic that reaches each device first, as long as nobody fails.
        reasons: lines for people.
    """

    experts: dict[str, list[ExpertId]]
    load: dict[str, float]
    reasons: list[str]


def place(
    devices: Sequence[Device], traffic: Array, replicas: int, *, current: Mapping[str, Sequence[ExpertId]] | None = None
) -> Placement:
    """Put every expert on `replicas` devices.

    Experts with the most traffic choose first. A device's load in a layer is the traffic of the experts that it is the
    first holder of; further copies go where they would add least if the first holder failed.

    Args:
        traffic: float32 [layers, experts], how often each is asked; only ratios count.
        current: where experts are now; one stays unless another device is clearly better.

    Raises:
        PlacementError: the devices can't hold that many copies.
    """
    layers, experts = traffic.shape
    _check(devices, layers * experts, replicas)
    share = traffic / max(float(traffic.sum()), 1e-9)
    held: dict[str, set[ExpertId]] = {d.name: set() for d in devices}
    first_load = {d.name: np.zeros(layers) for d in devices}
    spare_load = {d.name: np.zeros(layers) for d in devices}
    before = {name: set(ids) for name, ids in (current or {}).items()}
    stayed = moved = 0
    order = sorted(np.ndindex(layers, experts), key=lambda at: (-share[at], at))
    # All first copies before any second one: a device that is full of spares could not take a first copy.
    for copy in range(replicas):
        for layer, expert in order:
            id, weight = ExpertId(layer, expert), float(share[layer, expert])
            free = [d for d in devices if len(held[d.name]) < d.experts and id not in held[d.name]]
            if not free:
                raise PlacementError(f"no device with room is left for copy {copy + 1} of {id}: fewer --replicas")

            def done_ms(device: Device, layer: int = layer, weight: float = weight) -> tuple[float, float]:
                load = first_load[device.name] + spare_load[device.name]
                return (load[layer] + weight) * device.row_ms, load.sum() * device.row_ms

            best = min(free, key=lambda d: (*done_ms(d), d.name))
            stay = [d for d in free if id in before.get(d.name, ())]
            kept = min(stay, key=done_ms, default=None)
            if kept is not None and done_ms(kept)[0] <= (1 + HYSTERESIS) * done_ms(best)[0]:
                best = kept
            stayed += id in before.get(best.name, ())
            moved += bool(before) and id not in before.get(best.name, ())
            held[best.name].add(id)
            (first_load if copy == 0 else spare_load)[best.name][layer] += weight
    load = {name: float(per_layer.sum()) for name, per_layer in first_load.items()}
    reasons = [
        f"{d.name}: {len(held[d.name])} of the {d.experts} experts that fit; first holder for {load[d.name]:.0%} "
        f"of the traffic at {d.row_ms:.1f} ms a row"
        for d in devices
    ]
    if before:
        reasons.append(
            f"{stayed} copies stay where they are, {moved} are new: moved only for a gain of {HYSTERESIS:.0%}"
        )
    return Placement({name: sorted(ids) for name, ids in held.items()}, load, reasons)


def _check(devices: Sequence[Device], experts: int, replicas: int) -> None:
    if len(devices) < replicas:
        raise PlacementError(f"{replicas} copies of each expert need as many devices, there are {len(devices)}")
    room = sum(min(d.experts, experts) for d in devices)
    if room < replicas * experts:
        raise PlacementError(
            f"{experts} experts × {replicas} copies do not fit: all devices together hold {room}; add devices, or take "
            "a smaller --quant"
        )
