"""click options made from config dataclasses (`common.config`), grouped by config in `--help`.

Libraries that make a command line from dataclasses (pydantic-settings, jsonargparse, tyro, cyclopts) bring parsers of
their own, with other flags, messages and exit codes than the click commands that exist.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from click.core import ParameterSource

from common.config import ConfigError, ConfigField, Option, config_fields
from common.sizes import format_bytes, parse_bytes


class Size(click.ParamType[int]):
    """A number of bytes, written `800M` or `2G`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _ConfigOption(click.Option):
    """An option that knows under which heading of `--help` it belongs."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class _WithExample(click.Command):
    """A command whose `--help` ends with an example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        """Args:
        example: lines to type.
        """
        super().__init__(*args, **kwargs)
        self.example = example

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example as it is typed: click would fold its lines."""
        super().format_epilog(ctx, formatter)
        if self.example:
            with formatter.section("Example" if self.example.count("wdmoe-") == 1 else "Examples"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(_WithExample):
    """A command whose `--help` shows its own options first, and those of configs under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups of options."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(_WithExample, click.Group):
    """A group whose `--help` lists the commands in the order in which they were added."""

    command_class = Command

    def __init__(self, *args: Any, elsewhere: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        """Args:
        elsewhere: what to use instead, by names that users look for here and that are no commands.
        """
        super().__init__(*args, **kwargs)
        self.elsewhere = elsewhere or {}

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name."""
        if args[0] in self.elsewhere and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"No such command '{args[0]}': use {self.elsewhere[args[0]]}.", ctx)
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(self.commands)


def config_options(**configs: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command so that it has the options of config classes and is called with the configs.

    `@config_options(station=BaseStationConfig)` adds an option for each field that has one and calls the command with
    `station=BaseStationConfig(…)`. A nested config adds its fields. An optional nested config is made where the option
    of its first field is given and not 0. A `ConfigError` from the command becomes a usage error (exit code 2).
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            given = _given(click.get_current_context())
            try:
                made = {name: make_config(config, values, given) for name, config in configs.items()}
                own = {name: value for name, value in values.items() if name not in taken}
                return command(**made, **own)
            except ConfigError as error:
                raise click.UsageError(str(error)) from None

        options = [(field, option) for config in configs.values() for field, option in _options(config)]
        taken = {field.name for field, _ in options}
        for field, option in reversed(options):
            run = _decorator(field, option)(run)
        return run

    return decorate


def make_config(config: type, values: dict[str, Any], given: frozenset[str] = frozenset()) -> Any:
    """A config from the values of a command's options, by field name.

    Args:
        given: names of the fields that the user set, also to their defaults; kept in the config's field `given`, if it
            has one.

    Raises:
        ConfigError: a value is outside its limits.
    """
    arguments: dict[str, Any] = {}
    for field in config_fields(config):
        nested = _nested(field)
        if field.name == "given":
            arguments["given"] = given
        elif nested is not None:
            first = next(config_fields(nested))
            if not _is_optional(field.type) or values[first.name]:
                arguments[field.name] = make_config(nested, values, given)
        elif field.option is not None:
            value = values[field.name]
            enum = _plain(field.type)
            arguments[field.name] = enum[value.upper()] if _is_enum(enum) and isinstance(value, str) else value
    return config(**arguments)


def checked_config(config: type, given: Mapping[str, Any]) -> Any:
    """A config from values that a program gives by the names of a command's options, such as `nodes_timeout=120`.

    They are checked as the options are, and written as in the command or as Python has them. None means the default.

    Raises:
        ConfigError: a value is wrong.
        TypeError: there is no option of that name, or a required one is missing.
    """
    known = {field.flag.removeprefix("--").replace("-", "_"): (field, option) for field, option in _options(config)}
    for name in given.keys() - known.keys():
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"unknown option '{name}'" + (f": did you mean '{near[0]}'?" if near else ""))
    values: dict[str, Any] = {}
    set_on_purpose = frozenset(field.name for name, (field, _) in known.items() if given.get(name) is not None)
    for name, (field, option) in known.items():
        value = given.get(name)
        if value is None:
            if field.default is MISSING:
                raise TypeError(f"the option '{name}' is missing")
            values[field.name] = field.default
            continue
        kind = click.BOOL if _plain(field.type) is bool else _click_type(_plain(field.type), option)
        try:
            values[field.name] = kind.convert(value, None, None)
        except click.BadParameter as error:
            raise ConfigError(f"{name}: {error.message}") from None
    return make_config(config, values, set_on_purpose)


def _given(context: click.Context) -> frozenset[str]:
    """Names of the parameters that the user set, on the command line or in the environment."""
    defaults = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return frozenset(name for name in context.params if context.get_parameter_source(name) not in defaults)


def _options(config: type) -> Iterator[tuple[ConfigField, Option]]:
    for field in config_fields(config):
        if (nested := _nested(field)) is not None:
            optional = _is_optional(field.type)
            for inner, option in _options(nested):
                # Without the nested config none of its fields is required.
                missing = inner.default is MISSING
                yield inner._replace(default=None) if optional and missing else inner, option
        elif field.option is not None:
            yield field, field.option


def _decorator(field: ConfigField, option: Option) -> Callable[[Any], Any]:
    plain, default = _plain(field.type), field.default
    heading = option.heading or (field.owner.__doc__ or "").partition("\n")[0].rstrip(".")
    settings: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "heading": heading}
    declaration = field.flag
    if plain is bool and default is False:
        settings["is_flag"] = True
    elif plain is bool:
        declaration = f"{field.flag}/--no-{field.flag.removeprefix('--')}"
    elif get_origin(plain) is tuple:
        settings.update(type=_click_type(get_args(plain)[0], option), multiple=True)
    else:
        settings["type"] = _click_type(plain, option)
    if option.bare is not None:
        settings.update(is_flag=False, flag_value=option.bare)
    if default is MISSING:
        settings["required"] = True
    elif default not in (None, ()):
        settings.update(default=_written(option, default), show_default=default is not False)
    return click.option(declaration, field.name, cls=_ConfigOption, **settings)


def _written(option: Option, default: Any) -> Any:
    """A default as a user would write it."""
    if option.size:
        return format_bytes(default)
    return default.name.lower() if isinstance(default, Enum) else default


def _click_type(plain: Any, option: Option) -> click.ParamType[Any]:
    limits: dict[str, Any] = {"min": option.minimum, "max": option.maximum, "min_open": option.positive}
    limited = option.minimum is not None or option.maximum is not None
    if choices := _choices(plain):
        return click.Choice(choices)
    if plain is Path:
        return click.Path(path_type=Path, exists=option.exists, dir_okay=not option.exists)
    if option.size:
        return Size()
    if plain is int:
        return click.IntRange(**limits) if limited else click.INT
    if plain is float:
        return click.FloatRange(**limits) if limited else click.FLOAT
    return click.STRING


def _choices(plain: Any) -> list[Any]:
    """What a Literal, a union of Literals or an Enum allows; empty for other types."""
    if _is_enum(plain):
        return [member.name.lower() for member in plain]
    if get_origin(plain) is Literal:
        return list(get_args(plain))
    if get_origin(plain) in (Union, UnionType):
        return [choice for part in get_args(plain) for choice in _choices(part)]
    return []


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_optional(kind: Any) -> bool:
    return NoneType in get_args(kind)


def _plain(kind: Any) -> Any:
    """A type without `| None`."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if _is_optional(kind) and len(parts) == 1 else kind


def _nested(field: ConfigField) -> Any:
    """The config class of a field that holds another config; None for other fields."""
    plain = _plain(field.type)
    return plain if isinstance(plain, type) and is_dataclass(plain) else None
