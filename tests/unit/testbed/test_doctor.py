"""What `wdmoe-testbed doctor` finds."""

import importlib.metadata

import pytest

import testbed.preflight.doctor as doctor
from tests.in_process import run_in_process

_REQUIRES = [
    "click>=8.2",
    'paho-mqtt<3,>=2.1; extra == "edge"',
    "torch>=2.6; extra == 'bs'",
    'wdmoe[bs,edge]; extra == "testbed"',
    'scipy>=1.15; extra == "testbed"',
]


def test_an_extra_brings_those_that_it_names() -> None:
    assert doctor.required(_REQUIRES, "edge") == {"paho-mqtt"}
    assert doctor.required(_REQUIRES, "testbed") == {"paho-mqtt", "torch", "scipy"}
    assert doctor.required(_REQUIRES, "optimum") == set()


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: _REQUIRES)
    monkeypatch.setattr(importlib.metadata, "version", version)
    done = run_in_process("testbed", "doctor")
    assert done.returncode == 1
    lines = {line[8:24].strip(): line for line in done.stdout.splitlines()}
    assert lines["extra edge"].startswith("ok")
    assert lines["extra bs"].startswith("fail")
    assert lines["extra bs"].endswith("wdmoe-bs lacks torch: pip install 'wdmoe[bs]'")
    assert "RAM" not in lines  # what reads it may be missing


def test_a_machine_with_everything_and_one_without_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: _REQUIRES[:1])
    monkeypatch.setattr("shutil.which", lambda *arguments, **options: None)
    found = {check.name: check for check in doctor.examine()}
    assert found["mosquitto"].level == "warn"
    assert "apt install iputils-ping" in found["ping"].detail
    assert {"cores", "RAM", "disk", "clock", "CPU", "load"} <= set(found)
    assert all(check.level != "fail" for check in found.values())
