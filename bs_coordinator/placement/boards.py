"""Devices that can hold experts: kinds by name, and what is known or assumed of one device. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from bs_coordinator.placement.row_curve import RowCurve
from bs_coordinator.placement.shapes import ModelShape, Variant
from edge_node.experts import loaded_bytes
from wire.manifest import Scheme

_GIB = 2**30
CALL_S = 50e-6
"""Assumed time of one call of onnxruntime beyond reading weights."""
NODE_S = 0.5e-3
"""Assumed time of a request in a node beyond its experts: waking up, decoding, queue, encoding. In docs/performance.md,
nodes take 14 to 15 ms more per token of 30 layers than their experts alone."""
BROKER_S = 0.5e-3
"""What broker, MQTT clients and processes that wake up add to a link's round trip: 23 to 25 ms per token of 30 layers,
less 0.3 ms per layer of the emulated link itself (docs/performance.md, "Decode against the floor")."""
KERNEL_FACTOR: dict[Scheme, float] = {"int4": 1.6, "int8": 1.35, "int8-dynamic": 1.7, "fp16": 2.8, "fp32": 1.4}
"""Time of one row ÷ (bytes of the files ÷ memory bandwidth), on one x86-64 core (docs/performance.md, "Experts on a
device"). onnxruntime widens fp16 weights to fp32, so these are read twice as wide."""


class BoardKind(NamedTuple):
    """A kind of device. **None of these numbers was measured on a board**: they are assumptions.

    Attributes:
        ram_bytes: RAM for experts: the board's, less what the system and the node itself need.
        memory_bytes_per_s: sustained memory bandwidth of all cores together.
        ops_per_s: sustained multiplications and additions in matrix products of several rows.
        block_factor: how much longer int4 and int8 take than with dot-product instructions.
        source: where the numbers come from.
    """

    ram_bytes: int
    memory_bytes_per_s: float
    ops_per_s: float
    block_factor: float
    source: str


_PI4 = (
    "BCM2711 with 32 bits of LPDDR4-3200, 12.8 GB/s at most by the data sheet, a third of it assumed; no dot product, "
    "int4 takes 8 times the instructions of int8-dynamic (docs/devices.md)"
)
_PI5 = "BCM2712 with 32 bits of LPDDR4X-4267, 17.1 GB/s at most by the data sheet, 10 of it assumed"
KINDS: Mapping[str, BoardKind] = MappingProxyType(
    {
        "pi4-4g": BoardKind(3 * _GIB, 4e9, 12e9, 8.0, _PI4),
        "pi4-8g": BoardKind(7 * _GIB, 4e9, 12e9, 8.0, _PI4),
        "pi5-4g": BoardKind(3 * _GIB, 10e9, 100e9, 1.0, _PI5),
        "pi5-8g": BoardKind(7 * _GIB, 10e9, 100e9, 1.0, _PI5),
        "pi5-16g": BoardKind(15 * _GIB, 10e9, 100e9, 1.0, _PI5),
        "jetson-orin-nano-8g": BoardKind(
            6 * _GIB, 40e9, 1000e9, 1.0,
            "128 bits of LPDDR5, 68 GB/s at most by the data sheet, 60 % of it assumed, with CUDA",
        ),
    }
)  # fmt: skip

OTHER = BoardKind(0, 10e9, 100e9, 1.0, "no such board is known: assumed as fast as a Raspberry Pi 5")


class BoardLink(NamedTuple):
    """The link between base station and a device.

    Attributes:
        rtt_s: round trip of an empty message, the broker's share included (`BROKER_S`).
        down_mbps, up_mbps: rates in Mbit/s, to the device and from it.
    """

    rtt_s: float
    down_mbps: float
    up_mbps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A device of a fleet.

    Attributes:
        name: of its node.
        kind: name of a `BoardKind`, or what else it is, for messages.
        facts: assumptions for what was not measured.
        ram_bytes: RAM for experts.
        link: to the base station.
        link_assumed: fields of the link that were neither measured nor stated.
        disk_bytes: disk space for experts; None if there is enough.
        node_s: time of a request in the node beyond its experts.
        byte_s: measured seconds per byte of a unit's files, by the rows that go through it, for each quantisation as
            `str(Quantisation)` writes it.
    """

    name: str
    kind: str
    facts: BoardKind
    ram_bytes: int
    link: BoardLink
    link_assumed: frozenset[str] = frozenset()
    disk_bytes: int | None = None
    node_s: float = NODE_S
    byte_s: Mapping[str, RowCurve] = field(default_factory=dict)

    def fits(self, variant: Variant) -> int:
        """How many units fit into RAM and on the disk, by the estimate with which a node refuses what does not fit."""
        each = loaded_bytes(variant.unit_bytes, variant.quantisation.scheme)
        # While a unit is loaded, its file is in memory as well.
        in_ram = max(0, self.ram_bytes - variant.unit_bytes) // each
        return in_ram if self.disk_bytes is None else min(in_ram, self.disk_bytes // variant.unit_bytes)

    def ram_of(self, variant: Variant, units: int) -> int:
        """RAM in bytes that so many units take, by the same estimate."""
        return (
            units * loaded_bytes(variant.unit_bytes, variant.quantisation.scheme) + min(units, 1) * variant.unit_bytes
        )

    def unit_s(self, shape: ModelShape, variant: Variant) -> RowCurve:
        """Seconds for so many rows through one unit."""
        size = variant.unit_bytes
        if measured := self.byte_s.get(str(variant.quantisation)):
            return measured.scaled(size)
        scheme = variant.quantisation.scheme
        slower = self.facts.block_factor if variant.quantisation.block else 1.0
        first_s = CALL_S + slower * KERNEL_FACTOR[scheme] * size / self.facts.memory_bytes_per_s
        return RowCurve.line(first_s, slower * 2 * shape.expert_weights / variant.slices / self.facts.ops_per_s)
