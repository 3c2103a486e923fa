"""Differences between the answers of two processors: tolerances, measurements and their table. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from wire.manifest import Scheme
from wire.tensors import Array

SCHEMA = 1

_SUM_ORDER = (1e-5, "the same products, possibly added in another order")
_CODES = (3e-3, "a last bit decides to which of two neighbouring 8-bit codes an activation is rounded: about two codes")
_UNROUNDED = (0.03, "without dot product, activations stay in fp32; with it they are rounded to 8 bits per block")
_ONE_SCALE = (0.03, "activations have a single scale, whose last bit moves many codes by one")


def tolerance(scheme: Scheme, *, dot_product: bool) -> tuple[float, str]:
    """Largest ‖board − here‖ / ‖here‖ of a row between correct processors, and the reason for differences.

    Args:
        scheme: quantisation of the experts.
        dot_product: whether the board's processor has dot-product instructions. This machine is assumed to have them,
            or VNNI or AVX2.
    """
    match scheme:
        case "fp32" | "fp16":
            return _SUM_ORDER
        case "int8-dynamic":
            return _ONE_SCALE
        case "int4" | "int8":
            return _CODES if dot_product else _UNROUNDED


class BoardResult(Struct, frozen=True, kw_only=True):
    """Answers of one board's node in one quantisation, compared with this machine's node. Lists are per expert.

    Attributes:
        board: name of the board.
        variant: name of the bundle variant.
        quantisation: quantisation in the manifest.
        tolerance, why: largest difference between correct processors, and its reason.
        experts: the experts compared.
        difference: largest ‖board − here‖ / ‖here‖ of any row, for rows sent alone and together.
        error, error_here: ‖board − fp32‖ / ‖fp32‖ over all rows sent alone; the same for this machine.
        together: largest ‖together − alone‖ / ‖alone‖ of a row, both from the board.
        tokens, tokens_here: token ids generated with the board's experts only, and with this machine's.
        node, device: facts from the node's status.
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
        """Whether the differences of all experts are within the tolerance; NaN is not."""
        return all(d <= self.tolerance for d in self.difference)

    @property
    def equal_tokens(self) -> int:
        """Number of equal tokens before the first difference."""
        pairs = enumerate(zip(self.tokens, self.tokens_here, strict=False))
        return next((k for k, (a, b) in pairs if a != b), min(len(self.tokens), len(self.tokens_here)))


def row_error(found: Array, expected: Array) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ of a row; both float32 [rows, hidden]."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


def total_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖ over all rows."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def markdown(results: Sequence[BoardResult]) -> str:
    """A Markdown table with a line per quantisation and board, and the reasons for the tolerances."""
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
    return "\n".join([*lines, "", "Reasons for the tolerances:", "", *notes]) + "\n"
