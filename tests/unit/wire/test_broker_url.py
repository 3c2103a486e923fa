"""Broker URLs: what is refused, and that no message ever shows a part of a password."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.archive.pseudonyms import Pseudonyms
from testbed.facts import argv
from wire.broker_url import Access, check_broker_url, parse_broker_url, read_secret

_PLAIN = Access(allow_plaintext=True)
_SECRET = "Zq7Zq8Zq9"
"""Nothing else in a message has any three of these characters in a row."""


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "begins with none of"),
        ("broker.lan", "begins with none of"),
        ("https://broker.lan", "begins with none of"),
        ("mqtt://", "no host"),
        ("mqtt://pi@", "no host"),
        ("mqtt:broker.lan", "after host and port"),
        ("mqtt://broker..lan", "two dots"),
        ("mqtt://10.0.0.256", "not an IPv4 address"),
        ("mqtt://broker.lan:0", "no valid port"),
        ("mqtt://broker.lan:65536", "no valid port"),
        ("mqtt://broker.lan:mqtt", "no valid port"),
        ("mqtt://broker.lan:" + "9" * 5000, "no valid port"),
        ("mqtt://fe80::7", "no valid port"),
        ("mqtt://[fe80::7", "can't be read"),
        ("mqtt://broker.lan/cluster", "after host and port"),
        ("mqtt://broker.lan?cluster=x", "after host and port"),
        ("mqtt://broker.lan#x", "after host and port"),
        ("mqtt://pi%00@broker.lan", "can't be printed"),
        ("mqtt://pi%ff@broker.lan", "can't be printed"),
        ("mqtt://broker.lan:1883\n", "white space or control"),
        ("mqtt://bro\tker.lan", "white space or control"),
        (" mqtt://broker.lan", "white space or control"),
        ("mqtt://broker.lan\u2028", "white space or control"),
        ("mqtt://broker.lan:+80", "no valid port"),
        ("mqtt://broker.lan:８０", "no valid port"),
        ("mqtt://b1:1883,b2:1883", "no valid port"),
        ("mqtt://[v1.broker]", "only IPv6"),
        ("mqtt://[10.0.0.7]", "can't be read"),
        ("mqtt://0x7f000001", "not an IPv4 address"),
        ("mqtt://10.7", "not an IPv4 address"),
        ("mqtt://１０.0.0.256", "not an IPv4 address"),
        ("mqtt://xn--a.local", "not the encoded form"),
        ("ws://broker.lan", "begins with none of"),
        ("mqtt://pi:hush@broker.lan", "--password-file"),
        ("mqtt://pi:@broker.lan", "--password-file"),
        ("mqtt://pi:12/34@broker.lan", "--password-file"),
        ("mqtt://pi:12#34@broker.lan", "--password-file"),
    ],
)
def test_refusals_say_why(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_broker_url(url)


def test_hosts_are_encoded_and_users_quoted() -> None:
    address = parse_broker_url("mqtts://k%C3%BCche@Küche.local")
    assert (address.user, address.host) == ("küche", "xn--kche-0ra.local")
    assert parse_broker_url(str(address)) == address
    zone = parse_broker_url("mqtts://[fe80::7%25wlan0]")
    assert (zone.host, parse_broker_url(str(zone))) == ("fe80::7%wlan0", zone)
    assert parse_broker_url("mqtts://lab%3Api%40x@broker.lan").user == "lab:pi@x"


def test_password_files_of_windows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes("\ufeffgeheim ü\r\n".encode())
    file.chmod(0o600)
    assert read_secret(file) == "geheim ü"


_CHARACTERS = st.sampled_from("@:/#%?[]\\ \t\n&=+;'\"{}|^~℀：＠／\u2488é\udcff\x00")
_PASSWORDS = st.lists(st.one_of(st.just(_SECRET), _CHARACTERS), min_size=1, max_size=8).map("".join)
_AROUND = st.tuples(
    st.sampled_from(
        ["mqtt://", "mqtts://", "MQTT://", "memory://", "http://", "mqtt:", "mqtt:/", "//", "", " mqtt://"]
    ),
    st.sampled_from(["pi", "", "p%69", "pi@home", "é", "[", "a/b"]),
    st.sampled_from(["@broker.lan", "@broker.lan:1883", "@[::1]", "@[::1", "@", "", "@a..b", "@b:x", "/x", "@b/x?y#z"]),
)


@given(_AROUND, _PASSWORDS)
@example(("mqtt://", "pi", "@broker.lan"), f"{_SECRET}]")
@example(("mqtt://", "pi", "@broker.lan"), f"℀{_SECRET}")
@example(("mqtt://", "pi", "@broker.lan"), f"1#{_SECRET}")
def test_no_message_shows_a_part_of_a_password(around: tuple[str, str, str], password: str) -> None:
    scheme, user, host = around
    url = f"{scheme}{user}:{password}{host}"
    shown = ""
    try:
        address = parse_broker_url(url, _PLAIN)
        shown = f"{address} {address!r}"
    except ValueError as error:
        shown = f"{error} {error.__cause__} {error!r}"
    _has_no_secret(shown)
    if "@" in host:
        recorded = " ".join(argv(["wdmoe-bs", "nodes", "--broker", url, f"--broker={url}"]))
        _has_no_secret(recorded)


@given(st.lists(st.one_of(st.just(_SECRET), st.sampled_from("@:/#%?[]&=+;{}|^~é")), min_size=1).map("".join))
def test_archives_leave_passwords_out(password: str) -> None:
    text = Pseudonyms(bytes(32)).text(f"lost mqtt://pi:{password}@broker.lan:1883 again")
    _has_no_secret(text)
    assert text.startswith("lost mqtt://")
    assert text.endswith("again")


def _has_no_secret(text: str) -> None:
    found = [piece for n in range(len(_SECRET) - 2) if (piece := _SECRET[n : n + 3]).lower() in text.lower()]
    assert not found, re.sub(r"\s", " ", text)
