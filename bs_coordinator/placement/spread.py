"""Plans which device should hold which experts. Pure.

A layer waits for the answers of all devices that it asks, so traffic is balanced layer by layer: every expert goes to
the device that would finish its share of that layer's traffic first. Where a bundle cuts experts into slices, each
slice is placed as an expert of its own, with the expert's traffic, so that an expert's slices go to different devices.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bs_coordinator.errors import PlacementError
from wire.experts import UnitId, unit_name
from wire.tensors import Array

HYSTERESIS = 0.25
"""An expert is moved only to a device that would finish sooner by this share: a move costs its bytes over the air."""


class PlacementDevice(Struct, frozen=True):
    """A device that can hold experts.

    Attributes:
        name: of the node.
        experts: number of experts, or slices, that fit into its RAM.
        row_ms: time of one hidden state to the device, through an expert, and back (`wdmoe-bs links`).
    """

    name: str
    experts: int
    row_ms: float = 1.0


class Placement(Struct, frozen=True):
    """The experts, or slices, of each device, and why.

    Attributes:
        experts: by device, in order.
        load: by device, the share of all traffic for which it is the first holder.
        reasons: lines for people.
    """

    experts: dict[str, list[UnitId]]
    load: dict[str, float]
    reasons: list[str]


class _Load:
    """The traffic that a device has been given, by layer."""

    def __init__(self, device: PlacementDevice, layers: int) -> None:
        self.device = device
        self.held: set[UnitId] = set()
        self.first: NDArray[np.float64] = np.zeros(layers)
        self._spare: NDArray[np.float64] = np.zeros(layers)

    def can_take(self, id: UnitId) -> bool:
        return len(self.held) < self.device.experts and id not in self.held

    def done_ms(self, layer: int, weight: float) -> tuple[float, float]:
        """Score, the lower the better: when the layer would be done with `weight` more, then the whole model's load."""
        load = self.first + self._spare
        return (load[layer] + weight) * self.device.row_ms, load.sum() * self.device.row_ms

    def take(self, id: UnitId, weight: float, *, first: bool) -> None:
        self.held.add(id)
        (self.first if first else self._spare)[id.layer] += weight


def plan_placement(
    devices: Sequence[PlacementDevice],
    traffic: Array,
    replicas: int,
    *,
    slices: int = 1,
    current: Mapping[str, Sequence[UnitId]] | None = None,
) -> Placement:
    """Put every expert on `replicas` devices.

    Experts with the most traffic are placed first. A device's load in a layer is the traffic of the experts that it is
    the first holder of. Further copies go to the device that would add least if the first holder failed.

    Args:
        devices: to place experts on.
        traffic: float32 [layers, experts], how often each expert is asked; only ratios count.
        replicas: copies of each expert.
        slices: into which each expert is cut.
        current: the experts that devices hold now; a copy stays unless another device is clearly better.

    Raises:
        PlacementError: the devices can't hold that many copies.
    """
    traffic = traffic.repeat(slices, axis=1)
    layers, units = traffic.shape
    noun = "experts" if slices == 1 else "slices"
    _check(devices, layers * units, replicas, noun)
    share = traffic / max(float(traffic.sum()), 1e-9)
    loads = [_Load(device, layers) for device in devices]
    before = {name: set(ids) for name, ids in (current or {}).items()}
    stayed = moved = 0
    order = sorted(np.ndindex(layers, units), key=lambda at: (-share[at], at))
    # All first copies before any second one: a device full of spare copies could not take a first copy.
    for copy in range(replicas):
        for layer, unit in order:
            id, weight = UnitId(layer, unit), float(share[layer, unit])
            chosen = _choose(loads, id, weight, before)
            if chosen is None:
                name = unit_name(id, slices)
                raise PlacementError(f"no device has room for copy {copy + 1} of {name}: use fewer --replicas")
            stays = id in before.get(chosen.device.name, ())
            stayed += stays
            moved += bool(before) and not stays
            chosen.take(id, weight, first=copy == 0)
    load = {one.device.name: float(one.first.sum()) for one in loads}
    reasons = [
        f"{d.name}: {len(one.held)} of the {d.experts} {noun} that fit; first holder for {load[d.name]:.0%} "
        f"of the traffic at {d.row_ms:.1f} ms per row"
        for one in loads
        for d in (one.device,)
    ]
    if before:
        reasons.append(
            f"{stayed} copies stay where they are, {moved} are new: moved only for a gain of {HYSTERESIS:.0%}"
        )
    return Placement({one.device.name: sorted(one.held) for one in loads}, load, reasons)


def _choose(loads: Sequence[_Load], id: UnitId, weight: float, before: Mapping[str, set[UnitId]]) -> _Load | None:
    """The device for a copy; None if no device has room."""
    free = [load for load in loads if load.can_take(id)]
    if not free:
        return None
    best = min(free, key=lambda load: (*load.done_ms(id.layer, weight), load.device.name))
    holding = [load for load in free if id in before.get(load.device.name, ())]
    kept = min(holding, key=lambda load: load.done_ms(id.layer, weight), default=None)
    if kept is None or kept.done_ms(id.layer, weight)[0] > (1 + HYSTERESIS) * best.done_ms(id.layer, weight)[0]:
        return best
    return kept


def _check(devices: Sequence[PlacementDevice], units: int, replicas: int, noun: str) -> None:
    if len(devices) < replicas:
        raise PlacementError(f"{replicas} copies of each expert need as many devices, there are {len(devices)}")
    room = sum(min(d.experts, units) for d in devices)
    if room < replicas * units:
        raise PlacementError(
            f"{units} {noun} × {replicas} copies do not fit: all devices together hold {room}; add devices, or use "
            "a smaller --quant"
        )
