"""Checks of YAML files that decoding them into types leaves out. Pure.

YAML lets a key appear twice and the last one win, and has words for infinity and NaN: in a plan or a network both are
mistakes.
"""

import math
import re
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")
_MOST_DIGITS = 40
_PATH = re.compile(r" - at `\$(?P<path>.*?)`$")
_STEP = re.compile(r"\.(?P<name>[\w-]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")


def decode_yaml(raw: bytes, kind: type[T]) -> T:
    """A document of a type.

    Raises:
        ValueError: not YAML, not of this type, or refused by `check_yaml`; one line that begins with the line's number
            as far as it is known.
    """
    root = check_yaml(raw)
    try:
        return msgspec.yaml.decode(raw, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_place(root, str(error))}{' '.join(str(error).split())}") from None


def check_yaml(raw: bytes) -> Any:
    """Check that no key is given twice and that all numbers are finite.

    Returns:
        The root of the composed nodes (`yaml.Node`); None for an empty document.

    Raises:
        ValueError: not YAML, or one of these; one line with the line's number.
    """
    try:
        root = yaml.compose(raw, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", root)]
    while left:
        name, node = left.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            _check_number(name, node)
        elif isinstance(node, yaml.SequenceNode):
            left += [(name, item) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            left += [(str(key.value)[:80], value) for key, value in node.value]
    return root


def _check_keys(mapping: yaml.MappingNode) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in first:
            raise ValueError(f"line {line}: '{key.value[:80]}' is given twice (first in line {first[name]})")
        first[name] = line


def _check_number(name: str, node: yaml.ScalarNode) -> None:
    kind = node.tag.rpartition(":")[2]
    if kind not in ("int", "float"):
        return
    text = node.value.replace("_", "").lower()
    where = f"line {node.start_mark.line + 1}: {f'{name}: ' if name else ''}"
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{where}a number of {len(text)} characters is out of range")
    try:
        finite = math.isfinite(float(text.replace(".inf", "inf").replace(".nan", "nan")))
    except ValueError:  # such as hexadecimal numbers
        return
    if not finite:
        raise ValueError(f"{where}{node.value} is not a finite number")


def _place(root: Any, message: str) -> str:
    """`line 7: ` for a message of msgspec that ends with the path of a value; empty if several values may be meant."""
    if root is None or not (found := _PATH.search(message)):
        return ""
    nodes = [root]
    for step in _STEP.finditer(found["path"]):
        nodes = [inner for node in nodes for inner in _inner(node, step)] or nodes
    return f"line {nodes[0].start_mark.line + 1}: " if len(nodes) == 1 else ""


def _inner(node: Any, step: re.Match[str]) -> list[Any]:
    """The nodes that one step of a path may lead to; msgspec writes `[...]` for any key of a mapping."""
    if isinstance(node, yaml.MappingNode):
        return [value for key, value in node.value if step["name"] in (None, key.value)]
    if isinstance(node, yaml.SequenceNode) and step["index"]:
        return node.value[int(step["index"]) : int(step["index"]) + 1]  # type: ignore[no-any-return]
    return []
