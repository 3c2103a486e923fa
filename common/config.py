"""Configuration dataclasses whose fields describe themselves: help text, limits and units, checked on construction.

`common.options` makes click options from the same description, so that a command and a caller of the library have the
same names, defaults and limits.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A value can't be used: `str(error)` is one line that begins with the option, such as `--policy: …`."""


@dataclass(frozen=True, slots=True)
class Option:
    """Metadata of a field, as in `Annotated[float, Option("Seconds to wait.", minimum=0)]`.

    Attributes:
        help: sentence for `--help`; the default is appended unless it is None, False or empty.
        flag: option name where it differs from the field's, such as `--nodes-timeout` for `nodes_timeout_s`.
        minimum, maximum: inclusive limits of a number, or of each number of a tuple.
        positive: the number must also differ from `minimum`.
        size: the number is a count of bytes that users write as `800M` or `2G`.
        exists: the path must exist when it is given on the command line.
        bare: value of a text whose flag is given without one; None if it needs one.
        metavar: placeholder in `--help`.
        heading: of `--help`, under which the option is listed; that of its config's docstring if empty.
        check: further check of a value that is not None; raises ValueError saying what would be right.
    """

    help: str
    flag: str = ""
    minimum: float | None = None
    maximum: float | None = None
    positive: bool = False
    size: bool = False
    exists: bool = False
    bare: str | None = None
    metavar: str | None = None
    heading: str = ""
    check: Callable[[Any], object] | None = None


class ConfigField(NamedTuple):
    """One field of a config.

    Attributes:
        type: without `Annotated`; a config class for a nested config.
        option: None for fields that have no option: nested configs, and those that only callers of the library set.
        owner: the class that declares the field, which may be a base class.
    """

    name: str
    type: Any
    option: Option | None
    default: Any
    owner: type

    @property
    def flag(self) -> str:
        """The option as users type it, such as `--layer-timeout`."""
        return (self.option.flag if self.option else "") or f"--{self.name.replace('_', '-')}"


class Config:
    """Base of all configs: frozen dataclasses that check the limits of their fields when they are made.

    Raises:
        ConfigError: a value is outside its limits.
    """

    def __post_init__(self) -> None:
        for field in config_fields(type(self)):
            value = getattr(self, field.name)
            if field.option is not None and value is not None:
                for single in value if isinstance(value, tuple) else (value,):
                    _check(field, field.option, single)


def config_fields(config: type) -> Iterator[ConfigField]:
    """The fields of a config class in the order of their declaration, those of base classes first."""
    hints = get_type_hints(config, include_extras=True)
    declared: tuple[Field[Any], ...] = fields(config)
    for field in declared:
        hint = hints[field.name]
        base, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        option = next((m for m in metadata if isinstance(m, Option)), None)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        owner = next(c for c in reversed(config.__mro__) if field.name in inspect.get_annotations(c))
        yield ConfigField(field.name, base, option, default, owner)


def _check(field: ConfigField, option: Option, value: Any) -> None:
    low, high = option.minimum, option.maximum
    if low is not None and (value < low or (option.positive and value == low)):
        raise ConfigError(f"{field.flag}: {value} is not {'above' if option.positive else 'at least'} {low}")
    if high is not None and value > high:
        raise ConfigError(f"{field.flag}: {value} is not at most {high}")
    if option.check is not None:
        try:
            option.check(value)
        except ValueError as error:
            raise ConfigError(f"{field.flag}: {error}") from None
