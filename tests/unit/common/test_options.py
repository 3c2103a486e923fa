"""Options and library share their defaults and limits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bs_coordinator.commands.main import cli as base_station
from bs_coordinator.config import BaseStationConfig, ClusterConfig, ResidentConfig, SamplingConfig, ServeConfig
from common.config import ConfigError, ConfigField, config_fields
from common.options import make_config
from common.sizes import format_bytes, parse_bytes
from edge_node.cli import cli as node
from edge_node.config import NodeConfig, TuneConfig
from exporter.cli import cli as exporter
from exporter.config import ExportConfig
from testbed.cli import cli as experiments
from testbed.report.trace import TOKENS_PER_CELL
from testbed.statistics import RESAMPLES
from wire.tensors import WireDtype

_BUNDLE, _TUNED = {"bundle": Path("b")}, Path("t.json")
_HOLDING = {"bundles": (Path("b"),), "experts": "L*:E3"}
_HOLDING_ARGUMENTS = ["--bundle", "b", "--experts", "L*:E3"]

COMMANDS: list[tuple[click.Group, str, list[str], dict[Any, dict[str, Any]]]] = [
    (base_station, "generate", ["--bundle", "b", "--prompt", "p"], {BaseStationConfig: _BUNDLE, SamplingConfig: {}}),
    (base_station, "chat", ["--bundle", "b"], {BaseStationConfig: _BUNDLE, SamplingConfig: {}}),
    (base_station, "serve", ["--bundle", "b"], {BaseStationConfig: _BUNDLE, ServeConfig: {}}),
    (base_station, "nodes", ["--bundle", "b"], {ClusterConfig: _BUNDLE}),
    (base_station, "links", ["--bundle", "b"], {ClusterConfig: _BUNDLE}),
    (
        node, "serve", [*_HOLDING_ARGUMENTS, "--broker", "mqtt://h", "--id", "n"],
        {NodeConfig: {**_HOLDING, "broker": "mqtt://h", "node": "n"}},
    ),
    (exporter, "bundle", ["checkpoint", "out"], {ExportConfig: {}}),
    (node, "tune", [*_HOLDING_ARGUMENTS, "--tuned", "t.json"], {TuneConfig: {**_HOLDING, "tuned": _TUNED}}),
]  # fmt: skip
WITHOUT_OPTION = {
    "traffic",  # which file depends on the bundle
    "given",  # the options themselves
    "skip",  # follows from the --session file
    *("min_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),  # asked for over HTTP only
}

each_command = pytest.mark.parametrize(
    ("group", "name", "arguments", "configs"), COMMANDS, ids=[f"{group.name}-{name}" for group, name, _, _ in COMMANDS]
)


def _parse(group: click.Group, name: str, arguments: list[str]) -> click.Context:
    return group.commands[name].make_context(name, list(arguments))


def _fields(config: type) -> Iterator[ConfigField]:
    """All fields, those of nested configs instead of the field that holds them."""
    for field in config_fields(config):
        if field.option is None and field.name in ("access", "resident", "rule"):
            yield from _fields(field.type)
        else:
            yield field


@each_command
def test_without_options_a_command_does_what_the_library_does(
    group: click.Group, name: str, arguments: list[str], configs: dict[Any, dict[str, Any]]
) -> None:
    values = _parse(group, name, arguments).params
    for config, required in configs.items():
        assert make_config(config, values) == config(**required)


@each_command
def test_every_field_has_an_option(
    group: click.Group, name: str, arguments: list[str], configs: dict[Any, dict[str, Any]]
) -> None:
    options = {option for param in group.commands[name].params for option in param.opts}
    for config in configs:
        for field in _fields(config):
            assert (field.flag in options) != (field.name in WITHOUT_OPTION), field.name


def test_reports_have_the_librarys_defaults() -> None:
    defaults = {
        param.name: param.default for name in ("report", "compare") for param in experiments.commands[name].params
    }
    assert (defaults["resamples"], defaults["trace_tokens"]) == (RESAMPLES, TOKENS_PER_CELL)


def test_options_reach_the_config() -> None:
    def made(*arguments: str) -> Any:
        return make_config(BaseStationConfig, _parse(base_station, "chat", ["--bundle", "b", *arguments]).params)

    assert made("--wire", "int8").wire is WireDtype.INT8
    assert made("--password-file", "p", "--allow-plaintext").access.password_file == Path("p")
    assert made("--resident", "2G").resident == ResidentConfig(2 << 30)
    assert made("--resident", "0").resident == ResidentConfig(0)
    assert made("--preset", "exact", "--prepacked", "p").resident == ResidentConfig(prepacked=Path("p"))
    assert not made("--no-degrade").degrade


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resident", "two"], "'--resident': 'two' is not a size: write 800M or 2G"),
        (["--cluster", "a/b"], "--cluster: cluster 'a/b' is not valid"),
        (["--layer-timeout", "0"], "'--layer-timeout': 0.0 is not in the range x>=0.1"),
        (["--prepacked", "p"], "--prepacked: no experts are kept here: give --resident as well, or --preset fast"),
        (["--resident-from", __file__, "--preset", "field"], "--resident-from: no experts are kept here"),
        (["--prepacked", "p", "--resident", "0", "--preset", "fast"], "--prepacked: no experts are kept here"),
        (["--seed", str(2**64)], "--seed: 18446744073709551616 does not fit into 64 bits"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_the_option(arguments: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        base_station.main(["chat", "--bundle", "b", *arguments], standalone_mode=False)
    assert message in refused.value.format_message()


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (BaseStationConfig, {**_BUNDLE, "layer_timeout_s": 0.0}, "--layer-timeout: 0.0 is not at least 0.1"),
        (BaseStationConfig, {**_BUNDLE, "cluster": ""}, "--cluster: cluster '' is not valid"),
        (SamplingConfig, {"top_p": 0.0}, "--top-p: 0.0 is not above 0"),
        (SamplingConfig, {"temperature": 11.0}, "--temperature: 11.0 is not at most 10"),
    ],
)
def test_the_library_has_the_same_limits(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**values)


@given(st.integers(0, 1 << 50))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size
