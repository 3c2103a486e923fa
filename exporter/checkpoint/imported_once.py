"""Imports the parts of transformers with which checkpoints are tried, in the process from which others are forked.

The garbage collector is off meanwhile: it would go through all that has been imported again and again, for a fifth of
the time, and would copy its pages in each forked process.
"""

import gc
import importlib
from contextlib import suppress

_MODULES = (
    "transformers.core_model_loading",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)

gc.disable()
try:
    for _module in _MODULES:
        with suppress(ImportError):  # the forked process says what is missing
            importlib.import_module(_module)
finally:
    gc.freeze()
    gc.enable()
