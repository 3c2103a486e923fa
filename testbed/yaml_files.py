"""Checks of YAML files that decoding them into types leaves out. Pure.

YAML lets a key appear twice and the last one win, has words for infinity and NaN, and reads 010 as 8 and 1:30 as 90: in
a plan or a network all of these are mistakes. A few lines of references to references expand to any size.
"""

import math
import re
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")
_MOST_BYTES = 1 << 20
_MOST_NODES = 1 << 20
_MOST_DIGITS = 40
_MISREAD = re.compile(r"[-+]?0\d|.*:")
"""Numbers that are octal or sexagesimal in YAML 1.1."""
_OWN = "wdmoe_"
"""Variables of Ansible inventories that begin so are read here as well."""
_TAGS = ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp")
_PATH = re.compile(r" - at `\$(?P<path>.*?)`$")
_STEP = re.compile(r"\.(?P<name>[\w-]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")


def decode_yaml(raw: bytes, kind: type[T]) -> T:
    """A document of a type.

    Raises:
        ValueError: not YAML, not of this type, or refused by `check_yaml`; one line that begins with the line's number
            as far as it is known.
    """
    root = check_yaml(raw, own=True)
    try:
        return msgspec.yaml.decode(raw, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_place(root, str(error))}{' '.join(str(error).split())}") from None


def check_yaml(raw: bytes, *, own: bool = False) -> Any:
    """Check that no key is given twice, that all numbers are finite, and that the document is not too large.

    Args:
        own: the document is read here only, not by another program that has its own rules: tags and numbers that mean
            something else than they seem to are refused as well.

    Returns:
        The root of the composed nodes (`yaml.Node`); None for an empty document.

    Raises:
        ValueError: not YAML, or one of these; one line with the line's number.
    """
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"it has {len(raw)} bytes, at most {_MOST_BYTES} are possible")
    try:
        root = yaml.compose(raw, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _expanded(root, {})
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
        if own and node is not None:
            _check_tag(node)
        if isinstance(node, yaml.ScalarNode):
            _check_number(name, node, own=own)
        elif isinstance(node, yaml.SequenceNode):
            left += [(name, item) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            left += [(str(key.value)[:80], value) for key, value in node.value]
    return root


def _expanded(node: Any, known: dict[int, int]) -> int:
    """How many nodes there are when each alias stands for a copy.

    Args:
        known: the result by the id of each node; 0 while it is being counted.

    Raises:
        ValueError: too many, or a node contains itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    size = known.get(id(node), -1)
    if size == 0:
        raise ValueError(f"line {node.start_mark.line + 1}: it refers to itself")
    if size < 0:
        known[id(node)] = 0
        pairs = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if pairs else node.value
        size = known[id(node)] = 1 + sum(_expanded(part, known) for part in inner)
        if size > _MOST_NODES:
            raise ValueError(
                f"line {node.start_mark.line + 1}: its references expand to more than {_MOST_NODES} values"
            )
    return size


def _check_tag(node: Any) -> None:
    if node.tag.rpartition(":")[2] not in _TAGS or not node.tag.startswith("tag:yaml.org,2002:"):
        raise ValueError(f"line {node.start_mark.line + 1}: the tag {node.tag[:80]} has no meaning here: leave it out")


def _check_keys(mapping: yaml.MappingNode) -> None:
    first: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in first:
            raise ValueError(f"line {line}: '{key.value[:80]}' is given twice (first in line {first[name]})")
        first[name] = line


def _check_number(name: str, node: yaml.ScalarNode, *, own: bool) -> None:
    kind = node.tag.rpartition(":")[2]
    if kind not in ("int", "float"):
        return
    text = node.value.replace("_", "").lower()
    where = f"line {node.start_mark.line + 1}: {f'{name}: ' if name else ''}"
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{where}a number of {len(text)} characters is out of range")
    if (own or name.startswith(_OWN)) and _MISREAD.match(text):
        raise ValueError(f"{where}{node.value} means {yaml.safe_load(node.value)} in YAML: write {_plain(node.value)}")
    try:
        finite = math.isfinite(float(text.replace(".inf", "inf").replace(".nan", "nan")))
    except ValueError:  # such as hexadecimal numbers
        return
    if not finite:
        raise ValueError(f"{where}{node.value} is not a finite number")


def _plain(text: str) -> str:
    value = yaml.safe_load(text)
    return f"{value}, or '{text}' in quotes if it is not a number"


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
