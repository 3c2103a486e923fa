"""What to say where a package of an extra, such as `wdmoe[bs]`, is not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import MissingPackageError

_OWN_PACKAGES = {"common", "wire", "exporter", "edge_node", "bs_coordinator", "testbed", "wdmoe"}


def missing_package(error: Exception) -> str:
    """The third-party package that an import did not find; empty for other errors."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return "" if package in _OWN_PACKAGES or package in sys.stdlib_module_names else package


def describe_missing(package: str, extra: str) -> str:
    """One line that says how to install a package with the extra that brings it."""
    return f"the Python package {package} is not installed: pip install 'wdmoe[{extra}]'"


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Raise an import of a missing package as an error that names the extra.

    Raises:
        MissingPackageError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if package := missing_package(error):
            raise MissingPackageError(describe_missing(package, extra)) from error
        raise
