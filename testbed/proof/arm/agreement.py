"""How far answers of two processors may lie apart, how far they do, and the table of it. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from wire.manifest import Scheme
from wire.tensors import Array

SCHEMA = 1

_SUM_ORDER = (1e-5, "the same products, perhaps added up in another order")
_CODES = (3e-3, "a last bit decides to which of two neighbouring 8-bit codes an activation is rounded: about two codes")
_UNROUNDED = (0.03, "without dot product activations stay in fp32, elsewhere they are rounded to 8 bits per block")
_ONE_SCALE = (0.03, "a last bit of the activations' one scale moves many codes by one")


def tolerance(scheme: Scheme, *, dot_product: bool) -> tuple[float, str]:
    """Largest ‖board − here‖ / ‖here‖ of a row between healthy processors, and why they may differ at all.

    Args:
        dot_product: whether the board's processor has it; this machine's is taken to have it, or VNNI or AVX2.
    """
    match scheme:
        case "fp32" | "fp16":
            return _SUM_ORDER
        case "int8-dynamic":
            return _ONE_SCALE
        case "int4" | "int8":
            return _CODES if dot_product else _UNROUNDED


class BoardResult(Struct, frozen=True, kw_only=True):
    """What one board's node answered in one quantisation, against this machine's node. Lists are per expert.

    Attributes:
        quantisation: as the manifest says.
        tolerance, why: largest difference that healthy processors may show, and where it comes from.
        difference: largest ‖board − here‖ / ‖here‖ of any row, rows sent alone and together.
        error: ‖board − fp32‖ / ‖fp32‖ over all rows sent alone; `error_here` this machine's.
        together: largest ‖together − alone‖ / ‖alone‖ of a row of the board's own.
        tokens, tokens_here: generated with experts of this node alone.
        node, device: what it says of itself.
    """

    board: str
    variant: str
    quantisation: str
    tolerance: float
    why: str
    experts: list[str]
    difference: list[float]
    error: list[float]
    error_here: list[float]
    together: list[float]
    tokens: list[int]
    tokens_here: list[int]
    node: dict[str, Any]
    device: dict[str, Any]

    @property
    def agrees(self) -> bool:
        """Whether every expert is within the tolerance (a NaN is not)."""
        return all(d <= self.tolerance for d in self.difference)

    @property
    def equal_tokens(self) -> int:
        """How many of the tokens are the same up to the first that is not."""
        pairs = enumerate(zip(self.tokens, self.tokens_here, strict=False))
        return next((k for k, (a, b) in pairs if a != b), min(len(self.tokens), len(self.tokens_here)))


def row_error(found: Array, expected: Array) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ of a row; both float32 [rows, hidden]."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def total_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖ over all rows."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def markdown(results: Sequence[BoardResult]) -> str:
    """The table, a line per quantisation and board."""
    lines = [
        "| experts | board | answers | differs from x86: median, largest | tolerance | error to fp32: here, board | "
        "together against alone | tokens equal |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        verdict = "" if r.agrees else " **above**"
        lines.append(
            f"| {r.quantisation} | {r.board} | {len(r.experts)} | {statistics.median(r.difference):.1e}, "
            f"{max(r.difference):.1e}{verdict} | {r.tolerance:g} | {statistics.median(r.error_here):.3g}, "
            f"{statistics.median(r.error):.3g} | {max(r.together):.1e} | {r.equal_tokens} of {len(r.tokens_here)} |"
        )
    whys: dict[tuple[float, str], list[str]] = {}
    for r in results:
        whys.setdefault((r.tolerance, r.why), []).append(f"{r.quantisation} on {r.board}")
    notes = [f"- {limit:g}: {why} ({', '.join(who)})." for (limit, why), who in whys.items()]
    return "\n".join([*lines, "", "Where the tolerances come from:", "", *notes]) + "\n"
