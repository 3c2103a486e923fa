"""Assumptions of a radio simulation: positions of devices, their transmission and their speed.

The model is that of arXiv 2405.03131 and 2411.06681; docs/simulation.md lists which numbers are not from there.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bs_coordinator.airtime.allocation import Float, ShannonLinks
from bs_coordinator.selection.forecast import LayerForecast
from testbed.errors import SimulationError
from testbed.yaml_files import decode_yaml

# Bounds that keep every formula finite, far beyond what is physical.
Positive = Annotated[float, Meta(ge=1e-12, le=1e18)]
Decibels = Annotated[float, Meta(ge=-400, le=400)]
Metres = Annotated[float, Meta(ge=-1e7, le=1e7)]
Count = Annotated[int, Meta(ge=1, le=10**9)]
_SILU_FLOPS = 7
"""Operations per value of SiLU, x / (1 + exp(-x)), where an exponential counts as four."""


class RadioDevice(Struct, frozen=True, forbid_unknown_fields=True):
    """A device of the cell; device k holds expert k of every layer.

    Attributes:
        x_m, y_m: position in metres; the base station is at the origin.
        flops: floating-point operations per second.
    """

    x_m: Metres
    y_m: Metres
    flops: Positive

    @property
    def distance_m(self) -> float:
        """Distance from the base station in metres, at least 1, below which the path-loss model does not apply."""
        return max(1.0, float(np.hypot(self.x_m, self.y_m)))


_DEVICES = tuple(
    RadioDevice(x_m, y_m, flops)
    for x_m, y_m, flops in (
        (40, 30, 2e12), (-60, 80, 1e12), (90, -120, 2e12), (-160, -120, 1e12),
        (150, 200, 2e12), (-240, 180, 1e12), (280, -210, 2e12), (-240, -320, 1e12),
    )
)  # fmt: skip


class Setting(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One radio cell.

    Attributes:
        devices: by default eight, 50 to 400 m from the base station.
        bandwidth_hz: bandwidth of the whole channel, which devices share.
        carrier_ghz: carrier frequency.
        loss_1m_db: path loss at 1 m and 1 GHz.
        loss_exponent: path-loss exponent; 2 for free space, 3.19 for street canyons without line of sight
            (3GPP TR 38.901, optional model of UMi).
        fading: `rayleigh` draws each link's power from an exponential distribution, `none` uses path loss only.
        noise_dbm_hz: noise power density.
        bs_power_w: transmit power towards each device.
        device_power_w: transmit power of each device.
        value_bits: bits per value of a hidden state on the air.
        hidden, intermediate: an expert's dimensions; by default those of the traced model.
    """

    devices: Annotated[tuple[RadioDevice, ...], Meta(min_length=1)] = _DEVICES
    bandwidth_hz: Positive = 100e6
    carrier_ghz: Positive = 3.5
    loss_1m_db: Decibels = 32.4
    loss_exponent: Annotated[float, Meta(gt=0, le=10)] = 2.0
    fading: Literal["rayleigh", "none"] = "rayleigh"
    noise_dbm_hz: Decibels = -174.0
    bs_power_w: Positive = 10.0
    device_power_w: Positive = 0.2
    value_bits: Positive = 16
    hidden: Count | None = None
    intermediate: Count | None = None

    def path_gain(self) -> Float:
        """Mean ratio of received to transmitted power, float64 [devices]."""
        distance_m = np.array([device.distance_m for device in self.devices])
        loss_db = self.loss_1m_db + 20 * np.log10(self.carrier_ghz) + 10 * self.loss_exponent * np.log10(distance_m)
        gain: Float = 10 ** (-loss_db / 10)
        return gain


def read_setting(path: Path) -> Setting:
    """Read a setting from YAML; missing fields get their defaults.

    Raises:
        SimulationError: the file can't be read or is not a valid setting.
    """
    try:
        return decode_yaml(path.read_bytes(), Setting)
    except OSError as error:
        raise SimulationError(f"radio setting {path}: {error.strerror}") from None
    except ValueError as error:
        raise SimulationError(f"radio setting {path}: {error}") from None


def expert_flops(hidden: int, intermediate: int) -> int:
    """Floating-point operations of one SwiGLU expert for one hidden state.

    Three matrix products (4·m·m_h for w1 and w3, 2·m_h·m for w2), SiLU, and the product of the two branches.
    """
    return 6 * hidden * intermediate + (_SILU_FLOPS + 1) * intermediate


class Cell:
    """A setting's links and devices over many channel draws.

    Attributes:
        links: links of all draws, [draws, devices].
        total_hz: bandwidth of the channel.
        row_compute_s: float64 [devices], computing time of one expert for one hidden state.
    """

    def __init__(self, setting: Setting, *, hidden: int, intermediate: int, draws: int, seed: int) -> None:
        hidden, intermediate = setting.hidden or hidden, setting.intermediate or intermediate
        shape = (draws, len(setting.devices))
        rng = np.random.default_rng(seed)
        down, up = rng.exponential(size=(2, *shape)) if setting.fading == "rayleigh" else np.ones((2, *shape))
        per_noise = setting.path_gain() / (1e-3 * 10 ** (setting.noise_dbm_hz / 10))
        self.links = ShannonLinks(
            row_bits=hidden * setting.value_bits,
            down_hz=setting.bs_power_w * per_noise * down,
            up_hz=setting.device_power_w * per_noise * up,
        )
        self.total_hz = setting.bandwidth_hz
        self.row_compute_s: Float = expert_flops(hidden, intermediate) / np.array([d.flops for d in setting.devices])
        self._uniform_row_s = self.links.row_time(np.full(shape, self.total_hz / shape[1])).seconds

    @property
    def draws(self) -> int:
        """Number of channel draws."""
        return len(self._uniform_row_s)

    def forecast(self, draw: int, layer: int) -> LayerForecast:
        """Forecast of a base station that knows its links, with equal bandwidth shares."""
        devices = len(self.row_compute_s)
        zeros = np.zeros(devices)
        holder: NDArray[np.intp] = np.arange(devices)
        return LayerForecast(layer, holder, zeros, zeros, self._uniform_row_s[draw], self.row_compute_s)
