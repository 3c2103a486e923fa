"""Names of hosts and sizes: what is accepted, in which form, and what a refusal says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.names import check_host
from common.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("Broker.LAN", "broker.lan"),
        ("broker.lan.", "broker.lan"),
        ("küche.local", "xn--kche-0ra.local"),
        ("KÜCHE.local", "xn--kche-0ra.local"),
        ("xn--kche-0ra.local", "xn--kche-0ra.local"),
        ("ブローカー.lan", "xn--lck8dzcwcb.lan"),
        ("my_broker", "my_broker"),
        ("10.0.0.7", "10.0.0.7"),
        ("2001:DB8::7", "2001:db8::7"),
        ("fe80::7%wlan0", "fe80::7%wlan0"),
    ],
)
def test_hosts_have_the_form_that_certificates_have(text: str, host: str) -> None:
    assert check_host(text) == host
    assert check_host(host) == host


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("mqtts://10.0.0.7", "a URL is not a host"),
        ("pi@10.0.0.7", "a URL is not a host"),
        ("10.0.0.7:8883", "without a port"),
        ("broker.lan:8883", "without a port"),
        ("[2001:db8::7]", "without brackets"),
        ("10.0.0.256", "not an IPv4 address"),
        ("10.0.7", "not an IPv4 address"),
        ("10.0.0.07", "leading zeros"),
        ("0x0a000007", "not an IPv4 address"),
        ("10.0.0.0x7", "not an IPv4 address"),
        ("１０.0.0.256", "not an IPv4 address"),
        ("xn--a.lan", "not the encoded form"),
        ("xn--ü.lan", "characters"),
        ("broker;reboot", "not a valid part"),
        ("fe80::7%", "without a port"),
        ("broker..lan", "two dots"),
        (".lan", "two dots"),
        (".", "not a valid part"),
        ("-broker", "not a valid part"),
        ("*.lan", "not a valid part"),
        ("the broker", "not a valid part"),
        ("broker\nlan", "not a valid part"),
        ("b" * 64, "longer than 63"),
        ("ü" * 63, "longer than 63"),
        ("b." * 127 + "b", "more than 253"),
        ("\ud800", "characters"),
    ],
)
def test_invalid_hosts_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        check_host(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=12))
def test_a_host_is_ascii_or_refused(text: str) -> None:
    try:
        host = check_host(text)
    except ValueError:
        return
    assert host.isascii()
    assert check_host(host) == host


@pytest.mark.parametrize("text", ["9" * 400 + "G", "9" * 5000, "8E", "nanG", "infG", "-1M", "1e9"])
def test_texts_that_are_not_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write 800M or 2G"):
        parse_bytes(text)
