"""The wireless interface of a device, and what has changed about it since the start."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edge_node.telemetry import wifi
from edge_node.telemetry.commands import Commands
from edge_node.telemetry.parsed import Parsed
from edge_node.telemetry.wifi import Interface, Link, Station, Wireless
from wire.telemetry import Wifi

_T = TypeVar("_T")


class Radio:
    """A client of an access point."""

    def __init__(self, commands: Commands, root: Path = Path("/")) -> None:
        """Nothing is read yet.

        Args:
            root: below which /sys and /proc lie.
        """
        self._commands = commands
        self._root = root
        self._name: str | None = None
        self._info = Interface()
        self._link = Link()
        self._power_save: bool | None = None
        self._connected = False
        self._last_bssid: str | None = None
        self._roams = self._disconnects = 0

    def look(self, route: str | None) -> None:
        """Look at what an association and a driver's settings fix.

        Args:
            route: the interface that traffic goes over, taken if it is wireless; else the first wireless one.
        """
        net = self._root / "sys/class/net"
        names = sorted(path.parent.name for path in net.glob("*/phy80211")) or sorted(
            path.parent.name for path in net.glob("*/wireless")
        )
        self._name = name = route if route in names else next(iter(names), None)
        if name is None:
            return
        self._info = self._facts(name, "info", wifi.parse_info, Interface())
        self._link = self._facts(name, "link", wifi.parse_link, Link())
        self._power_save = self._commands.facts(
            "iw power_save", wifi.parse_power_save, None, "iw", "dev", name, "get", "power_save"
        )

    def sample(self) -> Wifi | None:
        """Facts of now; None where there is no wireless interface, or it is no client of an access point."""
        name = self._name
        if name is None or self._info.kind not in (None, "managed"):
            return None
        station = self._commands.facts(
            "iw station", wifi.parse_station, Station(), "iw", "dev", name, "station", "dump"
        )
        if station.bssid is not None and station.bssid != self._link.bssid:
            self.look(name)
        table = Wireless()
        if not self._commands.find("iw"):
            table = self._table(name)
        bssid = station.bssid or (None if self._commands.find("iw") else self._link.bssid)
        connected = bssid is not None or table.rssi_dbm is not None
        self._count(bssid, connected=connected)
        link, info = self._link, self._info
        if not connected:
            return Wifi(
                interface=name, connected=False, power_save=self._power_save, roams=self._roams,
                disconnects=self._disconnects,
            )  # fmt: skip
        frequency_mhz = info.frequency_mhz or link.frequency_mhz
        up, down = station.up, station.down
        return Wifi(
            interface=name,
            connected=True,
            ssid=(link.ssid or info.ssid or "")[:128] or None,
            bssid=bssid,
            rssi_dbm=station.rssi_dbm if station.rssi_dbm is not None else table.rssi_dbm,
            rssi_average_dbm=station.rssi_average_dbm,
            up_phy_mbps=up.phy_mbps,
            down_phy_mbps=down.phy_mbps,
            up_mode=up.mode,
            down_mode=down.mode,
            up_mcs=up.mcs,
            down_mcs=down.mcs,
            up_streams=up.streams,
            down_streams=down.streams,
            up_packets=station.up_packets,
            up_retries=station.up_retries,
            up_failed=station.up_failed if station.up_failed is not None else table.up_failed,
            down_packets=station.down_packets,
            down_dropped=station.down_dropped,
            beacon_losses=station.beacon_losses if station.beacon_losses is not None else table.beacon_losses,
            frequency_mhz=frequency_mhz,
            channel=info.channel or (wifi.channel_of(frequency_mhz) if frequency_mhz else None),
            width_mhz=info.width_mhz or up.width_mhz or down.width_mhz,
            band_ghz=wifi.band_ghz_of(frequency_mhz) if frequency_mhz else None,
            power_save=self._power_save,
            associated_s=station.associated_s,
            inactive_ms=station.inactive_ms,
            roams=self._roams,
            disconnects=self._disconnects,
        )

    def _count(self, bssid: str | None, *, connected: bool) -> None:
        if bssid is not None:
            self._roams += self._last_bssid is not None and bssid != self._last_bssid
            self._last_bssid = bssid
        self._disconnects += self._connected and not connected
        self._connected = connected

    def _facts(self, name: str, what: str, parse: Callable[[str], Parsed[_T]], nothing: _T) -> _T:
        return self._commands.facts(f"iw {what}", parse, nothing, "iw", "dev", name, what)

    def _table(self, name: str) -> Wireless:
        try:
            text = (self._root / "proc/net/wireless").read_text(errors="replace")
        except OSError:
            return Wireless()
        return self._commands.kept("/proc/net/wireless", wifi.parse_wireless(text, name))
