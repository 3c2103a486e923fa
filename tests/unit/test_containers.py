"""Dockerfile and compose.yaml fit the clone and its commands. No container engine is needed, and none is tried."""

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_docs import ROOT, SCRIPTS, check_command
from wire.experts import parse_selector

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
INSTRUCTIONS = [
    (words[0], words[2])
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line.strip() and not line.startswith("#") and (words := line.partition(" "))
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, with those of the stages that it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, rest in INSTRUCTIONS:
        if instruction == "FROM":
            source, _, name = rest.partition(" AS ")
            found[name] = current = list(found.get(source, []))
        else:
            current.append((instruction, rest))
    return found


def entrypoint(target: str) -> str:
    (words,) = [rest for instruction, rest in stages()[target] if instruction == "ENTRYPOINT"]
    (command,) = yaml.safe_load(words)
    return str(command)


def is_sent(path: str) -> bool:
    """Whether .dockerignore leaves a path to the build: the last line that fits it, or a folder around it, decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = [Path(path), *list(Path(path).parents)[:-1]]
            if any(fnmatch(str(part), pattern) or ("**" in line and part.name == pattern) for part in parts):
                sent = line.startswith("!")
    return sent


def test_what_is_copied_exists_and_is_sent() -> None:
    copied = [
        source
        for instruction, rest in INSTRUCTIONS
        if instruction == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert is_sent(source), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert set(packages["wheel"]["packages"]) <= set(copied)
    assert is_sent("wire/topics.py")


@pytest.mark.parametrize(
    "secret", ["api.key", "keys/ca.key", "keys/bs/cluster.key", "password", ".git/config", "bundle/manifest.json",
               "models/x.safetensors", "runs/x", "wire/__pycache__/x.pyc"],
)  # fmt: skip
def test_nothing_else_reaches_an_image(secret: str) -> None:
    assert not is_sent(secret)


def test_packages_come_from_the_lock_and_known_extras() -> None:
    installs = [rest for instruction, rest in INSTRUCTIONS if instruction == "RUN" and "pip install" in rest]
    for rest in installs:
        assert "-c constraints.txt" in rest
        (extras,) = re.findall(r"'\.\[([\w,]+)\]'", rest)
        assert set(extras.split(",")) <= set(EXTRAS)
    assert len(installs) == 2


@pytest.mark.parametrize("target", ["node", "base-station"])
def test_targets_run_our_commands_without_root(target: str) -> None:
    instructions = stages()[target]
    users = [rest for instruction, rest in instructions if instruction == "USER"]
    assert users == ["1000:1000"]
    assert entrypoint(target) in SCRIPTS


def test_services_build_targets_that_exist() -> None:
    targets = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert targets == {"node", "base-station"} <= set(stages())


def test_commands_of_services_parse() -> None:
    checked = 0
    for name, service in SERVICES.items():
        if name == "broker":
            continue
        if "entrypoint" in service:
            assert service["entrypoint"] == ["sh", "-ec"]
            (script,) = service["command"]
            commands = [shlex.split(part) for part in script.split("&&")]
        else:
            commands = [[entrypoint(service["build"]["target"]), *service["command"]]]
        for command, *arguments in commands:
            check_command(command, arguments, name)
            checked += 1
    assert checked == 5


def test_nodes_hold_all_experts_of_the_demo_once() -> None:
    commands = [service["command"] for name, service in SERVICES.items() if name.startswith("node")]
    held = [parse_selector(c[c.index("--experts") + 1], layers=30, experts=8) for c in commands]
    assert sorted(id for ids in held for id in ids) == sorted(parse_selector("L*:E*", layers=30, experts=8))


def test_node_names_and_health_checks_agree() -> None:
    for name, service in SERVICES.items():
        if name.startswith("node"):
            command = service["command"]
            assert command[command.index("--id") + 1] == name
            assert f"wdmoe/v1/default/nodes/{name}/status" in service["healthcheck"]["test"][1]


def test_names_are_declared_and_files_exist() -> None:
    for service in SERVICES.values():
        assert set(service.get("networks", [])) <= set(COMPOSE["networks"])
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        assert {config["source"] for config in service.get("configs", [])} <= set(COMPOSE["configs"])
        assert set(service.get("depends_on", [])) <= set(SERVICES)
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    assert (ROOT / "models" / "smol-mixtral-8x135m").is_dir()
    # Only this service can be reached, and only from this machine.
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"base-station"}
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["base-station"]["ports"])
    assert COMPOSE["networks"]["cluster"]["internal"] is True
    assert SERVICES["broker"]["networks"] == ["cluster"]
