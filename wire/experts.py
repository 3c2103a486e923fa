"""Names for experts and the selector grammar that the command lines share.

An expert is one SwiGLU feed-forward network of one layer, written `L04:E3`. A selector is one or more
clauses separated by blanks or semicolons; a clause is `L<set>:E<set>`; a set is `*` or numbers and ranges:

    L*:E3            expert 3 of every layer (the paper's arrangement: one expert index per device)
    L0-14:E*         all experts of the first fifteen layers
    L0,2-4:E1 L5:E*  a mixture
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_CLAUSE = re.compile(r"L(?P<layers>[\d,*-]+):E(?P<experts>[\d,*-]+)")
_ITEM = re.compile(r"(\d+)(?:-(\d+))?")


_MOST_REPEATS = 4
"""How often a selector may name everything there is. It bounds the work of reading a selector from a node's status."""


class ExpertId(NamedTuple):
    """Layer and expert index, both counted from 0."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}:E{self.expert}"


def parse_index_set(text: str, size: int) -> tuple[int, ...]:
    """Sorted indices named by a set such as `*`, `3` or `0,2-4`.

    Raises:
        ValueError: not a set, an index is not below `size`, or indices are repeated too often.
    """
    if text == "*":
        return tuple(range(size))
    chosen: set[int] = set()
    named = 0
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f"'{text}' is not a set of numbers: write '*', '3', '0-7' or '0,2-4'")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"range '{item}' runs backwards: write '{last}-{first}'")
        if last >= size:
            raise ValueError(f"index {last} is out of range: there are {size} (0 to {size - 1})")
        named += last + 1 - first
        if named > _MOST_REPEATS * size:
            raise ValueError(f"the set names more than {_MOST_REPEATS * size} indices of {size}: name each once")
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def parse_selector(text: str, *, layers: int, experts: int) -> tuple[ExpertId, ...]:
    """Sorted expert ids that a selector names, for a model of `layers` × `experts`.

    Raises:
        ValueError: the text is not a selector, names what the model does not have, or repeats experts too often.
    """
    chosen: set[ExpertId] = set()
    for some_layers, some_experts in _clauses(text, layers, experts):
        chosen.update(ExpertId(layer, expert) for layer in some_layers for expert in some_experts)
    return tuple(sorted(chosen))


def check_selector(text: str, *, layers: int, experts: int) -> None:
    """Check a selector without the work of listing its experts.

    Raises:
        ValueError: as for `parse_selector`.
    """
    for _ in _clauses(text, layers, experts):
        pass


def _clauses(text: str, layers: int, experts: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layers and experts of each clause."""
    named = 0
    for clause in text.replace(";", " ").split():
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(f"'{clause}' is not an expert selector: write 'L*:E3' or 'L0-14:E0,2'")
        some_layers = parse_index_set(match["layers"], layers)
        some_experts = parse_index_set(match["experts"], experts)
        named += len(some_layers) * len(some_experts)
        if named > _MOST_REPEATS * layers * experts:
            raise ValueError(f"the selector repeats experts too often: name each of the {layers * experts} once")
        yield some_layers, some_experts
    if not named:
        raise ValueError("no expert selected: write for example 'L*:E3'")


def format_selector(ids: Iterable[ExpertId]) -> str:
    """A short selector for these ids; `parse_selector` turns it into the same set again."""
    experts_by_layer: dict[int, set[int]] = defaultdict(set)
    for layer, expert in ids:
        experts_by_layer[layer].add(expert)
    layers_by_experts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for layer in sorted(experts_by_layer):
        layers_by_experts[tuple(sorted(experts_by_layer[layer]))].append(layer)
    return " ".join(f"L{format_ranges(ls)}:E{format_ranges(es)}" for es, ls in layers_by_experts.items())


def format_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as a short text, such as `0-5,7`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
