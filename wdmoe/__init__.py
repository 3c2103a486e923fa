"""WDMoE from Python: ask a fleet, run experiments, read their tables. docs/python.md has examples.

This is the public interface; all other packages may change without notice. Nothing is imported before it is used: a
name whose libraries are not installed raises `MissingPackageError`, which says what to install.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from common.config import ConfigError
from common.errors import WdmoeError
from common.extras import needs_extra
from wire import __version__

if TYPE_CHECKING:
    from wdmoe.answers import Answer, Token
    from wdmoe.cluster import Cluster, generate
    from wdmoe.runs import Run, load_run, run_experiment

__all__ = [
    "Answer", "Cluster", "ConfigError", "Run", "Token", "WdmoeError", "__version__", "generate", "load_run",
    "run_experiment",
]  # fmt: skip

_PLACES = {
    "Answer": ("wdmoe.answers", "bs"),
    "Token": ("wdmoe.answers", "bs"),
    "Cluster": ("wdmoe.cluster", "bs"),
    "generate": ("wdmoe.cluster", "bs"),
    "Run": ("wdmoe.runs", "testbed"),
    "load_run": ("wdmoe.runs", "testbed"),
    "run_experiment": ("wdmoe.runs", "testbed"),
}
"""Module of each name, and the extra that it needs."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'wdmoe' has no attribute '{name}'")
    module, extra = _PLACES[name]
    with needs_extra(extra):
        return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return __all__
