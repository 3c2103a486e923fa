"""Each kind of error has its own exit code, and docs/exit-codes.md lists exactly these."""

import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bs_coordinator.errors import DispatchError, ExpertsLostError
from common.errors import WdmoeError
from edge_node.errors import ProviderError
from wire.errors import FrameError, ProbeError, ResultContentError

ROOT = Path(__file__).parents[2]
SHARED: dict[type[WdmoeError], type[WdmoeError]] = {
    ExpertsLostError: DispatchError,
    ProviderError: ProbeError,
    ResultContentError: FrameError,
}
PACKAGES = ("common", "wire", "exporter", "edge_node", "bs_coordinator", "testbed")


def _errors() -> set[type[WdmoeError]]:
    for package in PACKAGES:
        importlib.import_module(f"{package}.errors")
    return {WdmoeError, *_subclasses(WdmoeError)}


def _subclasses(kind: type[WdmoeError]) -> Iterator[type[WdmoeError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _own_errors() -> set[type[WdmoeError]]:
    """Those that a package's errors module defines; tests may define others."""
    return {error for error in _errors() if error.__module__ in {f"{package}.errors" for package in PACKAGES}}


def test_no_two_errors_share_a_code_but_those_that_mean_the_same_to_a_user() -> None:
    for special, general in SHARED.items():
        assert special.exit_code == general.exit_code
    codes = Counter(error.exit_code for error in _own_errors() - set(SHARED))
    assert [code for code, count in codes.items() if count > 1] == []
    assert not {0, 2, 70, 130, 141} & set(codes)  # success, click, defects, Ctrl-C, a closed pipe


def test_errors_are_defined_in_the_errors_module_of_their_package() -> None:
    elsewhere = [
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "errors.py"
        for name in re.findall(r"^class \w+\((\w*Error)\):", path.read_text(), re.MULTILINE)
        if name in {error.__name__ for error in _own_errors()}
    ]
    assert elsewhere == []


def test_the_table_of_exit_codes_lists_every_error() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    listed = re.findall(r"^\| (\d+) \| `(\w+)` \| .+ \| `(\w+)` \|$", text, re.MULTILINE)
    expected = {(str(e.exit_code), e.__name__, e.__module__.partition(".")[0]) for e in _own_errors()}
    assert set(listed) == expected
    assert len(listed) == len(expected)
