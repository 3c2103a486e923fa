"""Parsers of what devices say, on outputs as their tools print them (`recordings/README.md`), whole, cut and broken."""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.telemetry import jetson, raspberry, wifi
from edge_node.telemetry.parsed import Parsed
from edge_node.telemetry.sysfs import read_frequencies, read_sensors
from edge_node.telemetry.wifi import Rate

RECORDINGS = Path(__file__).parent / "recordings"


def recording(name: str) -> str:
    """As `Commands` hands it on."""
    return (RECORDINGS / f"{name}.txt").read_bytes().decode(errors="replace")


def tree(name: str) -> dict[str, str]:
    """`path:value` lines as the mapping that `Files` reads."""
    pairs = (line.partition(":") for line in recording(f"sysfs/{name}").splitlines())
    return {path: value for path, _, value in pairs}


def proc_wireless(text: str) -> Parsed[wifi.Wireless]:
    return wifi.parse_wireless(text, "wlp0s20f3" if "wlp0s20f3" in text else "wlan0")


PARSERS: dict[str, Callable[[str], Parsed[Any]]] = {
    "iw-link": wifi.parse_link,
    "iw-station": wifi.parse_station,
    "iw-info": wifi.parse_info,
    "iw-power-save": wifi.parse_power_save,
    "proc-net-wireless": proc_wireless,
    "vcgencmd-get-throttled": raspberry.parse_throttled,
    "vcgencmd-measure-temp": raspberry.parse_temperature,
    "vcgencmd-measure-volts": raspberry.parse_volts,
    "vcgencmd-pmic-read-adc": raspberry.parse_pmic,
    "nvpmodel": jetson.parse_power_mode,
    "tegrastats": jetson.parse_tegrastats,
}


def parse(name: str) -> Parsed[Any]:
    return PARSERS[name.partition("/")[0]](recording(name))


def known(facts: Any) -> dict[str, Any]:
    """Fields with a value."""
    return {name: value for name, value in asdict(facts).items() if value not in (None, {}, ())}


def rate(*, mbps: float | None, **more: Any) -> dict[str, Any]:
    return {**asdict(Rate()), "phy_mbps": mbps, **more}


HE2 = {"mode": "he", "streams": 2}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "iw-link/brcmfmac-pi4",
            {"bssid": "02:1a:11:00:00:01", "ssid": "bench", "frequency_mhz": 5180, "rssi_dbm": -48}
            | {"down": rate(mbps=390.0), "up": rate(mbps=433.3)},
        ),
        (
            "iw-link/iwlwifi-ax210-6ghz",
            {"bssid": "02:1a:11:00:00:61", "ssid": "bench 6", "frequency_mhz": 6135, "rssi_dbm": -57}
            | {"down": rate(mbps=1921.5, mcs=9, width_mhz=160, **HE2)}
            | {"up": rate(mbps=2161.3, mcs=10, width_mhz=160, **HE2)},
        ),
        (
            "iw-link/ath9k-11n",
            {"bssid": "02:1a:11:00:00:24", "ssid": "caf\\xc3\\xa9: upstairs", "frequency_mhz": 2437, "rssi_dbm": -53}
            | {"down": rate(mbps=None), "up": rate(mbps=300.0, mode="ht", mcs=15, streams=2, width_mhz=40)},
        ),
    ],
)
def test_links(name: str, expected: dict[str, Any]) -> None:
    facts, complaint = parse(name)
    assert known(facts) == expected
    assert not complaint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "brcmfmac-pi5",
            {"rssi_dbm": -48, "up_packets": 40114, "up_failed": 12, "down_packets": 61420, "associated_s": 5121}
            | {"inactive_ms": 0, "up": rate(mbps=433.3), "down": rate(mbps=390.0)},
        ),
        (
            "iwlwifi-ax201-he",
            {"rssi_dbm": -62, "rssi_average_dbm": -61, "up_packets": 944, "up_retries": 31, "up_failed": 0}
            | {"down_packets": 1013, "down_dropped": 26, "beacon_losses": 2, "associated_s": 64, "inactive_ms": 12}
            | {
                "up": rate(mbps=245.0, mcs=3, width_mhz=80, **HE2),
                "down": rate(mbps=648.5, mcs=6, width_mhz=80, **HE2),
            },
        ),
        (
            "mt7921u-vht",
            {"rssi_dbm": -66, "rssi_average_dbm": -65, "up_packets": 240993, "up_retries": 18022, "up_failed": 41}
            | {"down_packets": 602114, "down_dropped": 77, "beacon_losses": 0, "associated_s": 4004, "inactive_ms": 20}
            | {"up": rate(mbps=351.0, mode="vht", mcs=4, streams=2, width_mhz=80)}
            | {"down": rate(mbps=526.5, mode="vht", mcs=6, streams=2, width_mhz=80)},
        ),
        (
            "ath10k-vht",
            {"rssi_dbm": -67, "rssi_average_dbm": -66, "up_packets": 9912, "up_retries": 0, "up_failed": 3}
            | {"down_packets": 10104, "down_dropped": 5, "beacon_losses": 0, "associated_s": 180, "inactive_ms": 4}
            | {"up": rate(mbps=6.0), "down": rate(mbps=325.0, mode="vht", mcs=7, streams=1, width_mhz=80)},
        ),
        # Of a device with several links the first, summed up, counts.
        (
            "ath12k-eht",
            {"rssi_dbm": -33, "rssi_average_dbm": -33, "up_packets": 9100, "up_retries": 311, "up_failed": 0}
            | {"down_packets": 98000, "down_dropped": 0, "associated_s": 188, "inactive_ms": 3}
            | {"up": rate(mbps=2882.4, mode="eht", mcs=13, streams=2, width_mhz=160)}
            | {"down": rate(mbps=2594.2, mode="eht", mcs=11, streams=2, width_mhz=160)},
        ),
    ],
)
def test_stations(name: str, expected: dict[str, Any]) -> None:
    facts, complaint = parse(f"iw-station/{name}")
    found = known(facts)
    assert found.pop("bssid").startswith("02:1a:11:")
    assert found == expected
    assert not complaint


def test_impossible_values_are_null_and_complained_of() -> None:
    positive = parse("iw-station/mt76x2-positive-signal")
    assert positive.facts.rssi_dbm is None
    assert positive.facts.rssi_average_dbm is None
    assert positive.facts.up_retries == 4589
    assert "75 [72, 75] dBm" in positive.complaint
    backwards = parse("iw-station/rtl88x2bu-ht")
    assert backwards.facts.inactive_ms is None
    assert (backwards.facts.up.mode, backwards.facts.up.mcs, backwards.facts.up.streams) == ("ht", 15, 2)
    assert backwards.facts.down == Rate()  # "(unknown)" is an answer
    assert "4294825206" in backwards.complaint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brcmfmac-pi4-5ghz", ("managed", "bench", 36, 5180, 80)),
        ("iwlwifi-6ghz", ("managed", "bench 6", 37, 6135, 160)),
        ("mt7921u-2ghz", ("managed", "bench", 6, 2437, 20)),
        ("access-point", ("AP", "bench", 11, 2462, 20)),
        ("not-associated", ("managed", None, None, None, None)),
    ],
)
def test_interfaces(name: str, expected: tuple[object, ...]) -> None:
    facts, complaint = parse(f"iw-info/{name}")
    assert tuple(asdict(facts).values()) == expected
    assert not complaint


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("iw-power-save/on", True),
        ("iw-power-save/off", False),
        ("vcgencmd-measure-temp/pi4", 48.3),
        ("vcgencmd-measure-temp/pi5", 61.5),
        ("vcgencmd-measure-temp/outside-in-winter", -3.7),
        ("vcgencmd-measure-volts/pi3", 1.2),
        ("vcgencmd-measure-volts/pi4", 0.86),
        ("vcgencmd-measure-volts/pi5", 0.72),
        ("nvpmodel/orin-nano-jetpack6", "15W"),
        ("nvpmodel/agx-orin-jetpack5", "30W"),
        ("nvpmodel/agx-orin-maxn", "MAXN"),
        ("nvpmodel/xavier-nx-jetpack4", "15W_6CORE"),
        ("vcgencmd-pmic-read-adc/pi4", {}),
    ],
)
def test_single_facts(name: str, facts: object) -> None:
    assert parse(name) == Parsed(facts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("brcmfmac-pi4", {"rssi_dbm": -48, "up_failed": 0, "beacon_losses": 0}),
        ("iwlwifi", {"rssi_dbm": -61, "up_failed": 7, "beacon_losses": 2}),
        ("rtl8192eu-scale", {"up_failed": 11, "beacon_losses": 0}),  # 72 of 100 is no dBm
        ("no-interface", {}),
    ],
)
def test_the_table_of_wireless_extensions(name: str, expected: dict[str, int]) -> None:
    facts, complaint = parse(f"proc-net-wireless/{name}")
    assert known(facts) == expected
    assert not complaint


@pytest.mark.parametrize(
    ("name", "bits", "now", "since_boot"),
    [
        ("fine", 0, "", ""),
        ("pi4-under-voltage-now", 0x50005, "under-voltage, throttled", "under-voltage, throttled"),
        ("pi5-hot", 0xE0008, "soft temperature limit", "frequency capped, throttled, soft temperature limit"),
    ],
)
def test_throttling(name: str, bits: int, now: str, since_boot: str) -> None:
    assert parse(f"vcgencmd-get-throttled/{name}") == Parsed(raspberry.Throttling(bits, now, since_boot))


def test_rails_of_a_pi5() -> None:
    idle, load = (parse(f"vcgencmd-pmic-read-adc/pi5-{state}") for state in ("idle", "load"))
    assert not idle.complaint
    assert len(idle.facts) == 14
    assert idle.facts["EXT5V"] == raspberry.PmicRail(volts=5.08691)
    assert idle.facts["EXT5V"].watts is None
    assert idle.facts["VDD_CORE"].watts == pytest.approx(1.12518 * 0.72745940, abs=1e-6)
    assert load.facts["VDD_CORE"].watts == pytest.approx(10.87674 * 0.89745940, abs=1e-6)
    cut = parse("vcgencmd-pmic-read-adc/cut")
    assert cut.complaint
    assert cut.facts["VDD_CORE"] == raspberry.PmicRail(amperes=1.12518)  # not 0.7 V, which is where it was cut
    assert "EXT5V" not in cut.facts


@pytest.mark.parametrize(
    ("name", "total", "soc", "gpu", "cores"),
    [
        ("orin-nano-jetpack6", (4.537, "VDD_IN"), ("tj", 47.656), (37, 624), (5, 1344)),
        # What VIN_SYS_5V0 feeds is not counted twice, and what reads -256 °C is off.
        ("agx-orin-jetpack5", (5.42, "sum of rails"), ("tj", 45.531), (0, 0), (4, 1728)),
        ("xavier-nx-jetpack4", (2.876, "VDD_IN"), ("CPU", 34.5), (12, 114), (2, 1190)),
        ("agx-xavier-jetpack4", (2.991, "sum of rails"), ("CPU", 46.0), (0, 318), (8, 1190)),
        ("nano-jetpack4", (1.642, "POM_5V_IN"), ("CPU", 32.0), (0, 76), (4, 921)),
    ],
)
def test_tegrastats(
    name: str, total: tuple[float, str], soc: tuple[str, float], gpu: tuple[float, float], cores: tuple[int, float]
) -> None:
    facts, complaint = parse(f"tegrastats/{name}")
    assert not complaint
    assert facts.total_watts == total
    assert facts.sensors_celsius[soc[0]] == soc[1]
    assert all(celsius > -60 for celsius in facts.sensors_celsius.values())
    assert "PMIC" not in facts.sensors_celsius  # a constant of older boards
    assert "NC" not in facts.rails_watts
    assert (facts.gpu_percent, facts.gpu_mhz) == gpu
    assert (len(facts.cpu_mhz), max(facts.cpu_mhz)) == cores


def test_sensors_of_boards() -> None:
    pi4, pi5, orin, laptop = (
        read_sensors(tree(name)) for name in ("pi4-bookworm", "pi5-bookworm", "orin-nano-jetpack6", "x86-laptop")
    )
    assert not any(parsed.complaint for parsed in (pi4, pi5, orin, laptop))
    assert pi4.facts.celsius == {"cpu_thermal temp1": 47.712}  # the zone of that name is the same sensor
    assert pi4.facts.under_voltage is False
    assert pi5.facts.under_voltage is True
    assert pi5.facts.celsius["rp1_adc temp1"] == 49.388
    assert orin.facts.rails["VDD_IN"].watts == pytest.approx(5.040 * 0.904)
    assert set(orin.facts.rails) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}  # no shunt voltages
    assert orin.facts.throttle_events == 14
    assert "cv0-thermal" not in orin.facts.celsius
    assert laptop.facts.celsius["nvme Composite"] == 38.85
    assert laptop.facts.celsius["nvme Composite 2"] == 41.85
    assert laptop.facts.throttle_events == 34
    assert laptop.facts.rails["BAT0 1"].watts == 9.12


def test_clocks_of_boards() -> None:
    assert asdict(read_frequencies(tree("pi5-bookworm")).facts) == {
        "slowest_mhz": 2400.0, "fastest_mhz": 2400.0, "governor": "performance",
    }  # fmt: skip
    orin = read_frequencies(tree("orin-nano-jetpack6")).facts
    assert (orin.slowest_mhz, orin.fastest_mhz, orin.governor) == (729.6, 1344.0, "schedutil")


def test_broken_files_are_null_and_complained_of() -> None:
    sensors, clocks = read_sensors(tree("broken")), read_frequencies(tree("broken"))
    assert sensors.complaint
    assert sensors.facts.celsius == {"thermal_zone1": 41.0}
    assert (sensors.facts.rails["VDD_IN"].volts, sensors.facts.rails["VDD_IN"].watts) == (5.04, None)
    assert clocks.complaint
    assert (clocks.facts.slowest_mhz, clocks.facts.governor) == (None, "schedutil")


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("state", ["cut", "garbage"])
def test_what_is_cut_or_broken_is_complained_of(kind: str, state: str) -> None:
    parsed = parse(f"{kind}/{state}")
    assert parsed.complaint
    if state == "garbage" and parsed.facts is not None:
        assert parsed.facts == type(parsed.facts)()  # nothing in it


def test_numbers_that_are_cut_are_not_believed() -> None:
    assert parse("iw-station/cut").facts.up_failed is None
    assert parse("iw-station/cut").facts.up_retries == 31
    assert parse("iw-link/cut").facts.rssi_dbm is None
    assert parse("iw-info/cut").facts.channel is None


def test_three_outputs_of_every_kind() -> None:
    for kind in (*PARSERS, "sysfs"):
        names = {path.stem for path in (RECORDINGS / kind).iterdir()}
        assert len(names) >= 3, kind
        assert names & {"cut", "garbage", "broken"}, kind


ALL = [path for path in sorted(RECORDINGS.rglob("*.txt")) if path.parent.name in PARSERS]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_no_damage_ends_a_parser(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    del content[cut:]
    for place in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=4)):
        if content:
            content[place] = data.draw(st.integers(0, 255))
    PARSERS[path.parent.name](content.decode(errors="replace"))


@given(st.text(max_size=200))
def test_no_text_ends_a_parser(text: str) -> None:
    for parser in PARSERS.values():
        parser(text)
    pairs = dict.fromkeys(tree("x86-laptop"), text)
    read_sensors(pairs)
    read_frequencies(pairs)


def test_channels() -> None:
    # IEEE 802.11-2020: 2407 + 5 n, 5000 + 5 n, and channel 14 by itself; 6 GHz: 5950 + 5 n, and channel 2 by itself.
    pairs = {2412: 1, 2437: 6, 2472: 13, 2484: 14, 5180: 36, 5825: 165, 5935: 2, 5955: 1, 6135: 37, 7115: 233}
    assert {mhz: wifi.channel_of(mhz) for mhz in pairs} == pairs
    assert [wifi.channel_of(mhz) for mhz in (0, 2400, 4900, 8000)] == [None] * 4
    assert [wifi.band_ghz_of(mhz) for mhz in (2412, 5180, 6135, 900)] == [2.4, 5.0, 6.0, None]


_THOR = (
    "08-26-2025 10:28:23 RAM 3590/125772MB (lfb 48x4MB) SWAP 0/62886MB (cached 0MB) CPU [3%@972,off,1%@972] "
    "EMC_FREQ 1%@4266 GR3D_FREQ 7%@[1575,1574,1573] NVENC_FREQ @1 cpu@45.5C tj@46C soc012@44.25C "
    "VDD_GPU 3567mW/3600mW VIN 16000mW/16100mW/16900mW NEW_FREQ 3%@[1,2]"
)


def test_fields_that_grow_lose_only_themselves() -> None:
    facts, complaint = jetson.parse_tegrastats(_THOR)
    assert (facts.gpu_percent, facts.gpu_mhz, facts.memory_percent) == (7.0, 1575.0, 1.0)
    assert facts.rails_watts == {"VDD_GPU": 3.567, "VIN": 16.0}
    assert facts.sensors_celsius == {"cpu": 45.5, "tj": 46.0, "soc012": 44.25}
    assert (facts.cpu_mhz, complaint) == ((972.0, 972.0), "")
    no_load = jetson.parse_tegrastats(_THOR.replace("7%@[1575,1574,1573]", "@[1575,1574,1573]")).facts
    assert (no_load.gpu_percent, no_load.gpu_mhz) == (None, 1575.0)
    unknown = jetson.parse_tegrastats(_THOR.replace("7%@[1575,1574,1573]", "7%/9%")).facts
    assert (unknown.gpu_percent, unknown.rails_watts) == (None, facts.rails_watts)
    long = jetson.parse_tegrastats(_THOR.replace("45.5C", "9" * 5000 + "C").replace("972", "9" * 5000)).facts
    assert (long.cpu_mhz, set(long.sensors_celsius)) == ((), {"tj", "soc012"})


_MLO = """Station 02:00:00:00:01:00 (on wlan0)
	inactive time:	12 ms
	rx packets:	100
	tx packets:	90
	tx bitrate:	2882.4 MBit/s 160MHz EHT-MCS 11 EHT-NSS 2 EHT-GI 0
	connected time:	77 seconds
	Link 0:
		Address: 02:00:00:00:01:01
		signal:  	-41 [-43, -44] dBm
		rx packets:	40
		tx bitrate:	286.7 MBit/s 20MHz EHT-MCS 11 EHT-NSS 2
	Link 2:
		Address: 02:00:00:00:01:03
		signal:  	-55 dBm
		tx bitrate:	2882.4 MBit/s 160MHz EHT-MCS 11 EHT-NSS 2
"""


def test_links_of_several_bands() -> None:
    """A Wi-Fi 7 station: its own values come first, then those of each link."""
    station = wifi.parse_station(_MLO).facts
    assert (station.bssid, station.down_packets, station.up_packets) == ("02:00:00:00:01:00", 100, 90)
    assert (station.rssi_dbm, station.associated_s) == (-41, 77)
    assert (station.up.phy_mbps, station.up.mode, station.up.mcs, station.up.width_mhz) == (2882.4, "eht", 11, 160)
    link = wifi.parse_link(
        "Connected to 02:00:00:00:01:00 (on wlan0)\n\tSSID: lab\n\tLink 0 BSSID 02:00:00:00:01:01\n\t\tfreq: 2437.0\n"
        "\tLink 2 BSSID 02:00:00:00:01:03\n\t\tfreq: 6135.0\n\tsignal: -41 dBm\n\ttx bitrate: 2882.4 MBit/s EHT-MCS 9\n"
    )
    assert (link.facts.ssid, link.facts.frequency_mhz, link.facts.rssi_dbm) == ("lab", 2437, -41)
    assert link.complaint == ""


def test_a_rate_of_another_standard_is_not_taken_for_an_older_one() -> None:
    for mode in ("UHR-MCS 9 UHR-NSS 2", "S1G-MCS 9"):
        rate = wifi.parse_station(_MLO.replace("EHT-MCS 11 EHT-NSS 2 EHT-GI 0", mode)).facts.up
        assert (rate.phy_mbps, rate.mode, rate.mcs, rate.width_mhz) == (2882.4, None, None, 160)


def test_the_interface_of_several_links_is_on_the_channel_of_the_first() -> None:
    text = (
        "Interface wlan0\n\tifindex 3\n\tssid lab\n\ttype managed\n\tlink 0:\n\t\taddr 02:00:00:00:01:01\n"
        "\t\tchannel 6 (2437 MHz), width: 20 MHz, center1: 2437 MHz\n\tlink 2:\n\t\taddr 02:00:00:00:01:03\n"
        "\t\tchannel 37 (6135 MHz), width: 320 MHz, center1: 6105 MHz\n"
    )
    facts, complaint = wifi.parse_info(text)
    assert (facts.ssid, facts.channel, facts.frequency_mhz, facts.width_mhz, complaint) == ("lab", 6, 2437, 20, "")


def test_power_modes_may_have_names_of_several_words() -> None:
    assert jetson.parse_power_mode("NV Power Mode: MODE_15W\r\n2\n").facts == "15W"
    assert jetson.parse_power_mode("NV Fan Mode:quiet\nNV Power Mode: MAXN SUPER\n2\n").facts == "MAXN SUPER"


@pytest.mark.parametrize("part", ["12 ms", "100", "2882.4", "160MHz", "EHT-MCS 11", "EHT-NSS 2", "77 seconds", "-41"])
def test_numbers_of_thousands_of_digits_are_left_out(part: str) -> None:
    digits = re.sub(r"\d+", "9" * 5000, part, count=1)
    station = wifi.parse_station(_MLO.replace(part, digits)).facts
    assert station.bssid == "02:00:00:00:01:00"
    info = f"Interface wlan0\n\ttype managed\n\tchannel 36 (5180 MHz), width: {digits} MHz\n"
    assert wifi.parse_info(info).facts.channel == 36
