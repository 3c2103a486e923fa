"""Parsers of a Raspberry Pi's `vcgencmd`, which asks its firmware. Pure."""

import re
from dataclasses import dataclass

from edge_node.telemetry.parsed import Parsed, is_cut

_CONDITIONS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 say what is the case now, bits 16 to 19 what was at any time since boot."""
_SINCE_BOOT_SHIFT = 16
_RAIL = re.compile(r"^\s*(\S+)_([AV]) (current|volt)\(\d+\)=(-?\d+(?:\.\d+)?)([AV])$")
_UNREGISTERED = "Command not registered"
INPUT_RAIL = "EXT5V"


@dataclass(frozen=True, slots=True)
class Throttling:
    """`vcgencmd get_throttled`: the bits, and their meaning in words, separated by commas."""

    bits: int | None = None
    now: str | None = None
    since_boot: str | None = None


@dataclass(frozen=True, slots=True)
class PmicRail:
    """One supply of a Raspberry Pi 5's power management chip."""

    volts: float | None = None
    amperes: float | None = None

    @property
    def watts(self) -> float | None:
        """Volts × amperes; None if one of them is not measured."""
        return None if self.volts is None or self.amperes is None else round(self.volts * self.amperes, 6)


def parse_throttled(text: str) -> Parsed[Throttling]:
    """Bits and words from `vcgencmd get_throttled`."""
    match = re.fullmatch(r"throttled=0x([0-9a-fA-F]{1,8})\n", text)
    if match is None:
        return Parsed(Throttling(), f"no flags: {text[:80]!r}")
    bits = int(match[1], 16)
    now, since = (_words(bits >> shift) for shift in (0, _SINCE_BOOT_SHIFT))
    return Parsed(Throttling(bits, now, since))


def parse_temperature(text: str) -> Parsed[float | None]:
    """Temperature in °C from `vcgencmd measure_temp`."""
    match = re.fullmatch(r"temp=(-?\d{1,3}(?:\.\d+)?)'C\n", text)
    return Parsed(float(match[1])) if match else Parsed(None, f"no temperature: {text[:80]!r}")


def parse_volts(text: str) -> Parsed[float | None]:
    """Core voltage in volts from `vcgencmd measure_volts core`."""
    match = re.fullmatch(r"volt=(\d{1,2}(?:\.\d+)?)V\n", text)
    return Parsed(float(match[1])) if match else Parsed(None, f"no voltage: {text[:80]!r}")


def parse_pmic(text: str) -> Parsed[dict[str, PmicRail]]:
    """Rails by name from `vcgencmd pmic_read_adc`; none on boards before the Raspberry Pi 5, which lack the command."""
    if _UNREGISTERED in text:
        return Parsed({})
    rails: dict[str, PmicRail] = {}
    complaint = f"cut off after {text[-40:]!r}" if is_cut(text) else ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        match = _RAIL.match(line)
        if match is None:
            complaint = complaint or f"not understood: {line[:80]!r}"
            continue
        if number == len(lines) and is_cut(text):
            continue  # the number may be cut off
        name, value = match[1], float(match[4])
        known = rails.get(name, PmicRail())
        rails[name] = PmicRail(value, known.amperes) if match[2] == "V" else PmicRail(known.volts, value)
    if not rails:
        complaint = complaint or "no rails"
    return Parsed(rails, complaint)


def _words(bits: int) -> str:
    return ", ".join(condition for i, condition in enumerate(_CONDITIONS) if bits >> i & 1)
