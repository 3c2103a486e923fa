"""Parsers of `iw` and /proc/net/wireless. Pure.

`iw` prints what nl80211 reports, and drivers differ in what they report: brcmfmac (Raspberry Pi) has no MCS, no retries
and no averages, mt76 and ath10k have per-antenna signals, iwlwifi has HE rates. What is missing is None.
"""

import re
from dataclasses import dataclass

from edge_node.telemetry.parsed import Fields, Parsed, is_cut, lines_of

_MAC = r"([0-9a-f]{2}(?::[0-9a-f]{2}){5})"
_STATION = re.compile(rf"^Station {_MAC} \(on (\S+)\)", re.MULTILINE | re.IGNORECASE)
_CONNECTED = re.compile(rf"^Connected to {_MAC} \(on (\S+)\)", re.MULTILINE | re.IGNORECASE)
_MODES = tuple(
    (mode, re.compile(rf"(?<![\w-]){name}MCS (\d{{1,2}})\b"))
    for mode, name in (("eht", "EHT-"), ("he", "HE-"), ("vht", "VHT-"), ("ht", ""))
)
_CHANNEL = re.compile(r"(\d{1,3}) \((\d{4,5})(?:\.\d+)? MHz\)(?:, width: (\d{1,4})(?:\+\d{1,4})? MHz)?")
_HT_MCS_PER_STREAM = 8
_NO_NOISE = -256


@dataclass(frozen=True, slots=True)
class Rate:
    """A bit rate of the radio in one direction, with modulation and coding as far as the driver reports them."""

    phy_mbps: float | None = None
    mode: str | None = None
    mcs: int | None = None
    streams: int | None = None
    width_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class WifiLink:
    """`iw dev X link`.

    Attributes:
        bssid: None when not connected.
    """

    bssid: str | None = None
    ssid: str | None = None
    frequency_mhz: int | None = None
    rssi_dbm: int | None = None
    down: Rate = Rate()
    up: Rate = Rate()


@dataclass(frozen=True, slots=True)
class WifiStation:
    """`iw dev X station dump` of a client: its access point. Counters since the association."""

    bssid: str | None = None
    rssi_dbm: int | None = None
    rssi_average_dbm: int | None = None
    down: Rate = Rate()
    up: Rate = Rate()
    up_packets: int | None = None
    up_retries: int | None = None
    up_failed: int | None = None
    down_packets: int | None = None
    down_dropped: int | None = None
    beacon_losses: int | None = None
    associated_s: int | None = None
    inactive_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Interface:
    """`iw dev X info`.

    Attributes:
        kind: `managed` for a client of an access point.
    """

    kind: str | None = None
    ssid: str | None = None
    channel: int | None = None
    frequency_mhz: int | None = None
    width_mhz: int | None = None


@dataclass(frozen=True, slots=True)
class Wireless:
    """One line of /proc/net/wireless, which kernels keep for drivers with Wireless Extensions."""

    rssi_dbm: int | None = None
    up_failed: int | None = None
    beacon_losses: int | None = None


def parse_link(text: str) -> Parsed[WifiLink]:
    """Facts from `iw dev X link`; without a BSSID if not connected."""
    if text.strip() == "Not connected.":
        return Parsed(WifiLink())
    connected = _CONNECTED.search(text)
    if connected is None:
        return Parsed(WifiLink(), f"no link: {text[:80]!r}")
    lines = lines_of(text[connected.end() :])
    fields = Fields(lines)
    link = WifiLink(
        bssid=connected[1].lower(),
        ssid=lines.get("SSID"),
        frequency_mhz=fields.integer("freq", r"(\d{4,5})(?:\.\d+)?$"),
        rssi_dbm=_dbm(fields, "signal"),
        down=_rate(lines, "rx bitrate", fields),
        up=_rate(lines, "tx bitrate", fields),
    )
    return Parsed(link, fields.complaint or _cut(text))


def parse_station(text: str) -> Parsed[WifiStation]:
    """Facts about the first station of `iw dev X station dump`; all None if not associated."""
    if not text.strip():
        return Parsed(WifiStation())  # not associated
    stations = list(_STATION.finditer(text))
    if not stations:
        return Parsed(WifiStation(), f"no station: {text[:80]!r}")
    end = stations[1].start() if len(stations) > 1 else len(text)
    lines = lines_of(text[stations[0].end() : end])
    fields = Fields(lines)
    station = WifiStation(
        bssid=stations[0][1].lower(),
        rssi_dbm=_dbm(fields, "signal"),
        rssi_average_dbm=_dbm(fields, "signal avg"),
        down=_rate(lines, "rx bitrate", fields),
        up=_rate(lines, "tx bitrate", fields),
        up_packets=fields.integer("tx packets", r"(\d{1,15})$"),
        up_retries=fields.integer("tx retries", r"(\d{1,15})$"),
        up_failed=fields.integer("tx failed", r"(\d{1,15})$"),
        down_packets=fields.integer("rx packets", r"(\d{1,15})$"),
        down_dropped=fields.integer("rx drop misc", r"(\d{1,15})$"),
        beacon_losses=fields.integer("beacon loss", r"(\d{1,15})$"),
        associated_s=fields.integer("connected time", r"(\d{1,15}) seconds$"),
        # More digits are a counter that ran backwards (some Realtek drivers).
        inactive_ms=fields.integer("inactive time", r"(\d{1,8}) ms$"),
    )
    return Parsed(station, fields.complaint or _cut(text))


def parse_info(text: str) -> Parsed[Interface]:
    """Facts from `iw dev X info`."""
    words: dict[str, str] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        word, _, rest = line.strip().partition(" ")
        words.setdefault(word, rest)  # of several links the first counts, as in `parse_link`
    if "Interface" not in words:
        return Parsed(Interface(), f"no interface: {text[:80]!r}")
    fields = Fields(words)
    channel = None
    if "channel" in words:
        channel = re.match(
            r"(\d{1,3}) \((\d{4,5})(?:\.\d+)? MHz\)(?:, width: (\d{1,4})(?:\+\d{1,4})? MHz)?", words["channel"]
        )
        if channel is None:
            fields.complain(f"channel {words['channel']}")
    interface = Interface(
        kind=words.get("type") or None,
        ssid=words.get("ssid") or None,
        channel=int(channel[1]) if channel else None,
        frequency_mhz=int(channel[2]) if channel else None,
        width_mhz=int(channel[3]) if channel and channel[3] else None,
    )
    return Parsed(interface, fields.complaint or _cut(text))


def parse_power_save(text: str) -> Parsed[bool | None]:
    """Whether power saving is on, from `iw dev X get power_save`."""
    match = re.fullmatch(r"Power save: (on|off)\n", text)
    return Parsed(match[1] == "on") if match else Parsed(None, f"no power save: {text[:80]!r}")


def parse_wireless(text: str, interface: str) -> Parsed[Wireless]:
    """Facts about one interface from /proc/net/wireless; all None if it has no line."""
    lines = text.splitlines()
    if len(lines) < 2 or "face" not in lines[1]:
        return Parsed(Wireless(), f"no table: {text[:80]!r}")
    row = next((line.split() for line in lines[2:] if line.strip().startswith(f"{interface}:")), None)
    if row is None:
        return Parsed(Wireless())
    try:
        level = int(float(row[3]))
        retry, missed = int(row[8]), int(row[10])
    except (IndexError, ValueError, OverflowError):
        return Parsed(Wireless(), f"not understood: {' '.join(row)[:80]!r}")
    # Positive levels are on a scale that only the driver knows.
    rssi = level if _NO_NOISE < level < 0 else None
    return Parsed(Wireless(rssi_dbm=rssi, up_failed=max(0, retry), beacon_losses=max(0, missed)))


def channel_of(frequency_mhz: int) -> int | None:
    """Number of the channel with this centre (IEEE 802.11-2020, 17.3.8.4.2; 6 GHz: 27.3.23.2); None for others."""
    if frequency_mhz == 2484:
        return 14
    if 2412 <= frequency_mhz <= 2472:
        return (frequency_mhz - 2407) // 5
    if 5150 <= frequency_mhz <= 5895:
        return (frequency_mhz - 5000) // 5
    if frequency_mhz == 5935:
        return 2
    if 5955 <= frequency_mhz <= 7115:
        return (frequency_mhz - 5950) // 5
    return None


def band_ghz_of(frequency_mhz: int) -> float | None:
    """The band that a frequency lies in: 2.4, 5 or 6 GHz; None for others."""
    if 2400 <= frequency_mhz <= 2500:
        return 2.4
    if 5150 <= frequency_mhz <= 5895:
        return 5.0
    return 6.0 if 5925 <= frequency_mhz <= 7125 else None


def _dbm(fields: Fields, name: str) -> int | None:
    """`-54 dBm` or `-54 [-56, -58] dBm`; positive values are driver errors and refused."""
    return fields.integer(name, r"(-\d{1,3}) (?:\[[-\d, ]+\] )?dBm$")


def _rate(lines: dict[str, str], name: str, fields: Fields) -> Rate:
    text = lines.get(name)
    if text is None or text == "(unknown)":
        return Rate()
    speed = re.match(r"(\d{1,6}(?:\.\d+)?) MBit/s", text)
    if speed is None:
        fields.complain(f"{name}: {text}")
        return Rate()
    mode, mcs = None, None
    for name_of, pattern in _MODES:
        if match := pattern.search(text):
            mode, mcs = name_of, int(match[1])
            break
    streams = re.search(r"-NSS (\d{1,2})\b", text)
    width = re.search(r"\b(\d{1,4})(?:\+\d{1,4})?MHz", text)
    number = int(streams[1]) if streams else None
    if mode == "ht" and mcs is not None:
        number = mcs // _HT_MCS_PER_STREAM + 1
    return Rate(
        phy_mbps=float(speed[1]),
        mode=mode,
        mcs=mcs,
        streams=number,
        width_mhz=int(width[1]) if width else None,
    )


def _cut(text: str) -> str:
    return f"cut off after {text[-40:]!r}" if is_cut(text) else ""
