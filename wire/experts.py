"""Names for experts and their slices, and the selector grammar that the command lines share.

An expert is one SwiGLU feed-forward network of one layer, written `L04:E3`. A bundle may cut each expert into slices,
whose outputs add up to the expert's; a slice is written `L04:E3/0`. What nodes hold is called a unit: a slice, or a
whole expert where the bundle has no slices. A selector is one or more clauses separated by blanks or semicolons; a
clause is `L<set>:E<set>` or `L<set>:E<set>/<set>`; a set is `*` or numbers and ranges:

    L*:E3            expert 3 of every layer, with all its slices (the paper's arrangement: one expert index per device)
    L0-14:E*         all experts of the first fifteen layers
    L0,2-4:E1 L5:E*  a mixture
    L*:E*/0          the first slice of every expert
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_CLAUSE = re.compile(r"L(?P<layers>[\d,*-]+):E(?P<experts>[\d,*-]+)(?:/(?P<slices>[\d,*-]+))?")
_ITEM = re.compile(r"(\d+)(?:-(\d+))?")


_MOST = 1 << 16
"""More layers, experts of a layer, or slices than models have."""
_MOST_REPEATS = 4
"""How often a selector may name everything there is. It bounds the work of reading a selector from a node's status."""


class ExpertId(NamedTuple):
    """Layer and expert index, both counted from 0."""

    layer: int
    expert: int

    def __str__(self) -> str:
        return f"L{self.layer:02d}:E{self.expert}"


UnitId = ExpertId
"""Names a unit: `expert` is then the unit's number in its layer, expert · slices + slice. Without slices, units are
experts. `unit_name` writes it for people."""


def units_of(ids: Iterable[ExpertId], slices: int) -> list[UnitId]:
    """All units of these experts, in the same order."""
    return [UnitId(layer, expert * slices + slice_) for layer, expert in ids for slice_ in range(slices)]


def expert_of(unit: UnitId, slices: int) -> ExpertId:
    """The expert that a unit belongs to."""
    return ExpertId(unit.layer, unit.expert // slices)


def unit_name(unit: UnitId, slices: int) -> str:
    """A unit as a selector names it, such as `L04:E3`, or `L04:E3/0` where there are slices."""
    return f"{expert_of(unit, slices)}/{unit.expert % slices}" if slices > 1 else str(unit)


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


def parse_selector(text: str, *, layers: int, experts: int, slices: int = 1) -> tuple[UnitId, ...]:
    """Sorted units that a selector names, for a model of `layers` × `experts`, each cut into `slices`.

    Raises:
        ValueError: the text is not a selector, names what the model does not have, or repeats units too often.
    """
    chosen: set[UnitId] = set()
    for some_layers, some_experts, some_slices in _clauses(text, layers, experts, slices):
        units = [expert * slices + slice_ for expert in some_experts for slice_ in some_slices]
        chosen.update(UnitId(layer, unit) for layer in some_layers for unit in units)
    return tuple(sorted(chosen))


def check_selector(text: str, *, layers: int, experts: int, slices: int = 1) -> None:
    """Check a selector without the work of listing its units.

    Raises:
        ValueError: as for `parse_selector`.
    """
    for _ in _clauses(text, layers, experts, slices):
        pass


def check_selector_syntax(text: str) -> None:
    """Check a selector for a model that is not known yet.

    Raises:
        ValueError: the text is a selector for no model.
    """
    check_selector(text, layers=_MOST, experts=_MOST, slices=_MOST)


def _clauses(text: str, layers: int, experts: int, slices: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Layers, experts and slices of each clause."""
    named = 0
    for clause in text.replace(";", " ").split():
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(
                f"'{clause}' is not an expert selector: write 'L*:E3' or 'L0-14:E0,2', or 'L*:E3/0' for a slice"
            )
        some_layers = parse_index_set(match["layers"], layers)
        some_experts = parse_index_set(match["experts"], experts)
        if match["slices"] is not None and slices == 1:
            raise ValueError(f"'{clause}' names a slice, but the experts are whole: leave '/{match['slices']}' out")
        some_slices = parse_index_set(match["slices"] or "*", slices)
        named += len(some_layers) * len(some_experts) * len(some_slices)
        if named > _MOST_REPEATS * layers * experts * slices:
            raise ValueError(f"the selector repeats experts too often: name each of the {layers * experts} once")
        yield some_layers, some_experts, some_slices
    if not named:
        raise ValueError("no expert selected: write for example 'L*:E3'")


def format_selector(units: Iterable[UnitId], slices: int = 1) -> str:
    """A short selector for these units; `parse_selector` turns it into the same set again."""
    by_layer: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for layer, unit in units:
        by_layer[layer][unit // slices].add(unit % slices)
    layers_by_part: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for layer in sorted(by_layer):
        experts_by_slices: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for expert in sorted(by_layer[layer]):
            experts_by_slices[tuple(sorted(by_layer[layer][expert]))].append(expert)
        parts = tuple(
            format_ranges(experts) + (f"/{format_ranges(some)}" if len(some) < slices else "")
            for some, experts in experts_by_slices.items()
        )
        layers_by_part[parts].append(layer)
    return " ".join(f"L{format_ranges(ls)}:E{part}" for parts, ls in layers_by_part.items() for part in parts)


def format_ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as a short text, such as `0-5,7`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
