"""Outputs of ping and iperf3, and the locale in which tools run."""

import os
import stat
from pathlib import Path

import pytest

from common.child_output import run_parsed
from testbed.iperf3 import received_mbps
from testbed.network.check import parse_ping

_IPERF = '{"start": {}, "end": {"sum_received": {"bits_per_second": 25e6, "more": 1}, "new": []}}'


def test_tools_speak_the_c_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "ping"
    tool.write_text(
        '#!/bin/sh\ncase "$LC_ALL" in C) w=time;; *) w=tiempo;; esac\n'
        'printf "64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 $w=1.25 ms \\377\\n"\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("LC_ALL", "LANG", "LANGUAGE"):
        monkeypatch.setenv(name, "es_ES.UTF-8")
    assert parse_ping(run_parsed(["ping"], timeout_s=10).stdout) == [1.25]


@pytest.mark.parametrize(
    ("line", "rtts"),
    [
        ("64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=0.412 ms", [0.412]),
        ("[1700000000.1] 64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=12 ms", [12.0]),
        ("64 bytes from 10.0.0.2: seq=0 ttl=64 time=0.4 ms", [0.4]),  # busybox
        ("64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time<1 ms", [1.0]),
        ("64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 tos=0x10 time=0.4 ms new=3", [0.4]),
        ("64 bytes: icmp_seq=1 time=0.4 ms\n64 bytes: icmp_seq=1 time=0.9 ms (DUP!)", [0.4]),
        (f"64 bytes: icmp_seq=1 time={'9' * 5000} ms\n64 bytes: icmp_seq=2 time=0.5 ms", [0.5]),
        ("64 bytes from 10.0.0.2: icmp_seq=0 ttl=64 time=0,412 ms", [0.412]),  # a comma, of whichever locale
        ("64 bytes from fe80::7%eth0: icmp_seq=1 ttl=64 time=1000 ms", [1000.0]),
        ("64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=1.2.3 ms", []),
        ("64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=-0.2 ms", []),
        ("no answer yet for icmp_seq=1\n64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=0.4 ms", [0.4]),
        ("From 10.0.0.1 icmp_seq=1 Destination Host Unreachable", []),
        ("rtt min/avg/max/mdev = 0.4/0.5/0.6/0.1 ms", []),
        ("", []),
    ],
)
def test_lines_of_ping(line: str, rtts: list[float]) -> None:
    assert parse_ping(line) == rtts


def test_results_of_iperf3() -> None:
    assert received_mbps(_IPERF) == 25.0
    assert received_mbps(f"warning: no SCTP\n{_IPERF}\niperf Done.\n") == 25.0
    assert received_mbps(f"warning: {{block size}} is large\n{_IPERF}\n") == 25.0
    assert received_mbps(_IPERF.replace('"start"', '"error": null, "start"')) == 25.0
    assert (
        received_mbps(_IPERF.replace(', "new"', ', "sum_received_bidir_reverse": {"bits_per_second": 1}, "new"'))
        == 25.0
    )
    assert received_mbps(_IPERF.replace("{", "{\n\t", 1) + "\n") == 25.0
    for text in ("", "{", "[]", "3", '{"end": []}', _IPERF.replace("25e6", "null"), _IPERF.replace("25e6", "-1")):
        with pytest.raises(ValueError, match=r"no JSON|no result"):
            received_mbps(text)
    with pytest.raises(ValueError, match="busy"):
        received_mbps('{"end": {}, "error": "the server is busy"}')
    partial = '{"intervals": [{"sum": {"bits_per_second": 1e6}}], "end": {}, "error": "control socket has closed"}'
    with pytest.raises(ValueError, match="control socket has closed"):
        received_mbps(partial)
