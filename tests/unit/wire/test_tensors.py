"""Every wire dtype keeps what it states: bytes per row, error, name and code."""

import re
from pathlib import Path

import click
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bs_coordinator.commands.main import cli
from testbed.plan.schema import WireName
from wire.tensors import Array, WireDtype, all_below, all_finite

DOCS = Path(__file__).parents[3] / "docs"
NAMES = [dtype.name.lower() for dtype in WireDtype]


@given(
    st.sampled_from(WireDtype),
    hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.floats(-(2.0**127), 2.0**127, width=32)
    ),
)
def test_a_tensor_comes_back_within_the_stated_error_in_the_stated_bytes(dtype: WireDtype, x: Array) -> None:
    sent = b"".join(dtype.codec.encode(x))
    assert len(sent) == len(x) * dtype.codec.row_bytes(x.shape[1])
    back = dtype.codec.decode(memoryview(sent), *x.shape)
    assert back.dtype == np.float32
    assert back.shape == x.shape
    assert (np.abs(back - x) <= dtype.codec.max_error(x)).all()


@pytest.mark.parametrize("dtype", WireDtype)
def test_the_stated_error_is_small_for_values_like_hidden_states(dtype: WireDtype) -> None:
    x = np.random.default_rng(0).standard_normal((64, 512), np.float32)
    assert dtype.codec.max_error(x).max() <= 0.03


def test_names_are_found_and_others_refused() -> None:
    assert [WireDtype.named(name) for name in NAMES] == list(WireDtype)
    with pytest.raises(ValueError, match=f"choose one of {', '.join(NAMES)}"):
        WireDtype.named("fp8")


def test_options_and_plans_offer_exactly_these() -> None:
    (option,) = (param for param in cli.commands["generate"].params if param.name == "wire")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == NAMES
    for name in NAMES:
        assert msgspec.convert(name, WireName) == name
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert("fp8", WireName)


def test_the_documents_list_exactly_these() -> None:
    protocol = (DOCS / "protocol.md").read_text()
    assert ", ".join(f"{dtype.value} {dtype.name.lower()}" for dtype in WireDtype) in protocol
    for document, row in (("glossary.md", "| wire dtype |"), ("experiments.md", "| `wire` |")):
        (line,) = (line for line in (DOCS / document).read_text().splitlines() if line.startswith(row))
        assert {f"`{name}`" for name in NAMES} <= set(re.findall(r"`\w+`", line)), document


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(width=32)),
    st.sampled_from([1, 2000]),
    st.sampled_from([1.0, 65520.0, float("inf")]),
)
def test_finite_and_small_enough_is_what_every_single_value_is(x: Array, repeated: int, limit: float) -> None:
    x = np.tile(x, (repeated, 1))  # the largest have more values than are multiplied
    assert all_finite(x) == np.isfinite(x).all()
    assert all_below(x, limit) == (np.abs(x) < limit).all()
