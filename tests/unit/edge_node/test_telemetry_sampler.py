"""The sampler with real processes as tools: shell scripts that print what a device's tools print."""

from pathlib import Path

import pytest

from edge_node.telemetry.commands import Commands
from edge_node.telemetry.sampler import TelemetrySampler
from tests.unit.edge_node.test_telemetry_parsers import RECORDINGS, tree
from tests.waiting import wait_until
from wire.telemetry import Telemetry, decode_telemetry, encode_telemetry


class Device:
    """A folder with tools and files of a board."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "root", folder / "bin"
        self.root.mkdir(parents=True)
        self.bin.mkdir()

    def tool(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def file(self, path: str, content: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)

    def files(self, recording: str) -> None:
        for path, value in tree(recording).items():
            self.file(f"sys/{path}", value + "\n")

    def sampler(self) -> TelemetrySampler:
        # A generous deadline: this machine may be busy.
        commands = Commands(f"{self.bin}:/usr/bin:/bin", timeout_s=5.0)
        return TelemetrySampler("n1", "b1", commands=commands, root=self.root)


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def _iw(device: Device, **recordings: str) -> None:
    """`iw dev wlan0 …`: each of its questions answered with a recording, which may be exchanged later."""
    answers = {"link": "link", "info": "info", "station dump": "station", "get power_save": "power-save"}
    cases = ""
    for question, name in answers.items():
        link = device.bin / f"{name}.txt"
        link.unlink(missing_ok=True)
        link.symlink_to(RECORDINGS / f"iw-{name}" / f"{recordings[name.replace('-', '_')]}.txt")
        cases += f'"{question}") exec cat {link};;\n'
    device.tool("iw", f'shift 2\ncase "$*" in\n{cases}esac')
    device.file("sys/class/net/wlan0/phy80211/name", "phy0\n")


def _valid(sample: Telemetry) -> Telemetry:
    """What the base station makes of it."""
    return decode_telemetry(encode_telemetry(sample), "n1")


def test_a_raspberry_pi_5(device: Device) -> None:
    _iw(device, link="brcmfmac-pi4", info="brcmfmac-pi4-5ghz", station="brcmfmac-pi5", power_save="on")
    device.files("pi5-bookworm")
    device.file("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    r = RECORDINGS
    device.tool(
        "vcgencmd",
        f"""case "$1" in
get_throttled) cat {r}/vcgencmd-get-throttled/pi5-hot.txt;;
measure_temp) cat {r}/vcgencmd-measure-temp/pi5.txt;;
measure_volts) cat {r}/vcgencmd-measure-volts/pi5.txt;;
pmic_read_adc) cat {r}/vcgencmd-pmic-read-adc/pi5-idle.txt;;
esac""",
    )
    sample = _valid(device.sampler().sample())
    assert sample.warnings == {}
    radio = sample.wifi
    assert radio is not None
    assert (radio.interface, radio.connected, radio.ssid, radio.rssi_dbm) == ("wlan0", True, "bench", -48)
    assert (radio.channel, radio.frequency_mhz, radio.width_mhz, radio.band_ghz) == (36, 5180, 80, 5.0)
    assert (radio.up_phy_mbps, radio.down_phy_mbps, radio.up_failed, radio.up_retries) == (433.3, 390.0, 12, None)
    assert radio.power_save is True
    assert sample.thermal.soc_celsius == 61.5
    assert sample.thermal.throttled_bits == 0xE0008
    assert sample.thermal.throttling_now == "soft temperature limit"
    assert (sample.power.supply_volts, sample.power.core_volts) == (5.08691, 0.72)
    watts = [rail.watts for name, rail in sample.power.rails.items() if rail.watts is not None and "rp1" not in name]
    assert sample.power.board_watts == pytest.approx(sum(watts), abs=1e-3)
    assert sample.power.board_watts_from == "sum of rails"
    assert (sample.clocks.cpu_fastest_mhz, sample.clocks.governor) == (2400.0, "performance")


def test_an_orin_nano(device: Device) -> None:
    device.files("orin-nano-jetpack6")
    device.tool("nvpmodel", f"cat {RECORDINGS}/nvpmodel/orin-nano-jetpack6.txt")
    device.tool("tegrastats", f"cat {RECORDINGS}/tegrastats/orin-nano-jetpack6.txt\nexec sleep 60")
    sampler = device.sampler()
    try:
        samples: list[Telemetry] = []

        def gpu_is_known() -> bool:
            samples.append(_valid(sampler.sample()))
            return samples[-1].clocks.gpu_mhz is not None

        wait_until(gpu_is_known, "tegrastats")
        sample = samples[-1]
        assert sample.wifi is None
        assert (sample.clocks.gpu_mhz, sample.clocks.gpu_percent, sample.clocks.memory_percent) == (624.0, 37.0, 4.0)
        assert (sample.power.board_watts, sample.power.board_watts_from) == (4.537, "VDD_IN")
        assert (sample.power.supply_volts, sample.power.mode) == (5.04, "15W")
        assert sample.power.rails["VDD_IN"].amperes == 0.904
        assert sample.thermal.throttle_events == 14
        # No line in this second: the sensor files go on telling.
        assert _valid(sampler.sample()).power.board_watts == pytest.approx(5.04 * 0.904)
    finally:
        sampler.close()


def test_without_tools_and_sensors_all_values_are_null(device: Device) -> None:
    sample = _valid(device.sampler().sample())
    assert sample.wifi is None
    assert sample.thermal.soc_celsius is None
    assert sample.thermal.sensors_celsius == {}
    assert (sample.power.board_watts, sample.power.mode, sample.clocks.cpu_fastest_mhz) == (None, None, None)
    assert sample.warnings == {}


def test_roaming_and_losing_the_association(device: Device) -> None:
    pairs = [
        ("brcmfmac-pi5", "brcmfmac-pi4", 0, 0),
        ("mt7921u-vht", "iwlwifi-ax210-6ghz", 1, 0),  # another access point
        ("not-associated", "not-connected", 1, 1),
        ("mt7921u-vht", "iwlwifi-ax210-6ghz", 1, 1),  # back at the same one
        ("brcmfmac-pi5", "brcmfmac-pi4", 2, 1),
    ]
    _iw(device, link="brcmfmac-pi4", info="not-associated", station="brcmfmac-pi5", power_save="off")
    sampler = device.sampler()
    for station, link, roams, disconnects in pairs:
        _iw(device, link=link, info="not-associated", station=station, power_save="off")
        radio = _valid(sampler.sample()).wifi
        assert radio is not None
        assert (radio.roams, radio.disconnects) == (roams, disconnects)
        assert radio.connected == (station != "not-associated")
        if station == "mt7921u-vht":
            # Looked at at once, not when the next slow look is due.
            assert (radio.ssid, radio.frequency_mhz, radio.channel, radio.band_ghz) == ("bench 6", 6135, 37, 6.0)


def test_a_device_too_busy_to_run_its_tools_is_not_disconnected(device: Device) -> None:
    _iw(device, link="brcmfmac-pi4", info="brcmfmac-pi4-5ghz", station="brcmfmac-pi5", power_save="on")
    sampler = device.sampler()
    before = _valid(sampler.sample()).wifi
    assert before is not None
    device.tool("iw", "exit 1")
    for _ in range(5):  # also while it is not asked any more
        later = _valid(sampler.sample()).wifi
        assert later is not None
        assert (later.connected, later.bssid, later.ssid) == (True, before.bssid, before.ssid)
        assert (later.power_save, later.disconnects, later.roams) == (True, 0, 0)
        assert later.rssi_dbm is None, "what changes fast is not repeated"


def test_an_access_point_is_no_client(device: Device) -> None:
    _iw(device, link="not-connected", info="access-point", station="brcmfmac-pi5", power_save="off")
    assert device.sampler().sample().wifi is None


def test_without_iw_the_kernel_s_table_serves(device: Device) -> None:
    device.file("sys/class/net/wlan0/wireless/link", "0\n")
    device.file("proc/net/wireless", (RECORDINGS / "proc-net-wireless/brcmfmac-pi4.txt").read_text())
    radio = _valid(device.sampler().sample()).wifi
    assert radio is not None
    assert (radio.connected, radio.rssi_dbm, radio.beacon_losses, radio.bssid) == (True, -48, 0, None)


def test_garbage_is_one_warning_per_output(device: Device) -> None:
    _iw(device, link="garbage", info="garbage", station="garbage", power_save="garbage")
    device.tool("vcgencmd", "head -c 400 /dev/urandom")
    device.tool("nvpmodel", "echo NVPM ERROR")
    device.files("broken")
    sampler = device.sampler()
    sample = _valid(sampler.sample())
    assert sample.wifi is not None
    assert not sample.wifi.connected
    assert sample.thermal.throttled_bits is None
    once = ["iw info", "iw link", "iw power_save", "iw station", "vcgencmd get_throttled", "vcgencmd measure_temp"]
    once += ["vcgencmd measure_volts", "nvpmodel", "sensors", "cpufreq"]
    assert sample.warnings == dict.fromkeys(once, 1)
    assert _valid(sampler.sample()).warnings["iw station"] == 2


def test_a_tool_that_hangs_or_fails_is_given_up_for_a_while(tmp_path: Path) -> None:
    device = Device(tmp_path)
    device.tool("slow", "exec sleep 60")
    device.tool("broken", "exit 3")
    commands = Commands(str(device.bin) + ":/usr/bin:/bin", timeout_s=0.2)
    for _ in range(20):
        assert commands.ask("slow", "slow") is None
        assert commands.ask("broken", "broken") is None
        assert commands.ask("absent", "absent") is None
    assert commands.warnings == {"slow": 3, "broken": 3}  # three attempts, not twenty
