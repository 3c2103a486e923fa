"""The wireless interface of a device, and what has changed about it since the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edge_node.telemetry import wifi
from edge_node.telemetry.commands import Commands
from edge_node.telemetry.parsed import Parsed
from edge_node.telemetry.wifi import Interface, WifiLink, WifiStation, Wireless
from wire.telemetry import Wifi

_T = TypeVar("_T")

_FROM_STATION = (
    "rssi_average_dbm", "up_packets", "up_retries", "down_packets", "down_dropped", "associated_s", "inactive_ms",
)  # fmt: skip
"""Fields of `Wifi` that `WifiStation` has under the same name."""
_FROM_STATION_OR_WIRELESS = ("rssi_dbm", "up_failed", "beacon_losses")
"""Fields of `Wifi` that `WifiStation` has under the same name, and `Wireless` for want of it."""
_FROM_RATE = ("phy_mbps", "mode", "mcs", "streams")
"""Fields of `Rate`; `Wifi` has each twice, with `up_` or `down_` before its name."""


class Radio:
    """A device's connection to an access point."""

    def __init__(self, commands: Commands, root: Path = Path("/")) -> None:
        """Nothing is read yet.

        Args:
            root: folder that holds /sys and /proc.
        """
        self._commands = commands
        self._root = root
        self._name: str | None = None
        self._info = Interface()
        self._link = WifiLink()
        self._power_save: bool | None = None
        self._connected = False
        self._last_bssid: str | None = None
        self._roams = self._disconnects = 0

    def read_settings(self, route: str | None) -> None:
        """Read what stays the same during an association: interface, network, channel, power saving.

        What a tool does not answer in time stays as it was: a busy device is not a disconnected one.

        Args:
            route: the interface that traffic goes over; it is taken if it is wireless, else the first wireless one.
        """
        net = self._root / "sys/class/net"
        names = sorted(path.parent.name for path in net.glob("*/phy80211")) or sorted(
            path.parent.name for path in net.glob("*/wireless")
        )
        name = route if route in names else next(iter(names), None)
        if name != self._name:
            self._name, self._info, self._link, self._power_save = name, Interface(), WifiLink(), None
        if name is None:
            return
        self._info = self._facts(name, "info", wifi.parse_info, self._info)
        self._link = self._facts(name, "link", wifi.parse_link, self._link)
        self._power_save = self._commands.facts(
            "iw power_save", wifi.parse_power_save, self._power_save, "iw", "dev", name, "get", "power_save"
        )

    def sample(self) -> Wifi | None:
        """The present facts; None if there is no wireless interface, or it is not a client of an access point."""
        name = self._name
        if name is None or self._info.kind not in (None, "managed"):
            return None
        answer = self._commands.ask("iw station", "iw", "dev", name, "station", "dump")
        station = WifiStation() if answer is None else self._commands.kept("iw station", wifi.parse_station(answer))
        if station.bssid is not None and station.bssid != self._link.bssid:
            self._info, self._link = Interface(), WifiLink(bssid=station.bssid)
            self.read_settings(name)
        # Without an answer it counts as associated as it was.
        wireless = self._wireless(name) if answer is None else Wireless()
        bssid = station.bssid or (self._link.bssid if answer is None else None)
        connected = bssid is not None or wireless.rssi_dbm is not None
        self._count(bssid, connected=connected)
        facts = _facts_of(station, wireless, self._link, self._info) if connected else {}
        return Wifi(
            interface=name,
            connected=connected,
            bssid=bssid,
            power_save=self._power_save,
            roams=self._roams,
            disconnects=self._disconnects,
            **facts,
        )

    def _count(self, bssid: str | None, *, connected: bool) -> None:
        if bssid is not None:
            self._roams += self._last_bssid is not None and bssid != self._last_bssid
            self._last_bssid = bssid
        self._disconnects += self._connected and not connected
        self._connected = connected

    def _facts(self, name: str, what: str, parse: Callable[[str], Parsed[_T]], nothing: _T) -> _T:
        return self._commands.facts(f"iw {what}", parse, nothing, "iw", "dev", name, what)

    def _wireless(self, name: str) -> Wireless:
        try:
            text = (self._root / "proc/net/wireless").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return Wireless()
        return self._commands.kept("/proc/net/wireless", wifi.parse_wireless(text, name))


def _facts_of(station: WifiStation, wireless: Wireless, link: WifiLink, info: Interface) -> dict[str, Any]:
    """Fields of `Wifi` of an interface that is connected."""
    facts = {name: getattr(station, name) for name in _FROM_STATION}
    for name in _FROM_STATION_OR_WIRELESS:
        value = getattr(station, name)
        facts[name] = value if value is not None else getattr(wireless, name)
    for direction, rate in (("up", station.up), ("down", station.down)):
        facts |= {f"{direction}_{name}": getattr(rate, name) for name in _FROM_RATE}
    frequency_mhz = info.frequency_mhz or link.frequency_mhz
    return facts | {
        "ssid": (link.ssid or info.ssid or "")[:128] or None,
        "frequency_mhz": frequency_mhz,
        "channel": info.channel or (wifi.channel_of(frequency_mhz) if frequency_mhz else None),
        "width_mhz": info.width_mhz or station.up.width_mhz or station.down.width_mhz,
        "band_ghz": wifi.band_ghz_of(frequency_mhz) if frequency_mhz else None,
    }
