"""Experts on a device, as a node and a base station that keeps some itself use them.

Outside of `edge_node`, import from here: `ExpertRuntime` loads, proves and runs experts; the other names answer how
much memory experts take and how much there is. onnxruntime is imported when `ExpertRuntime` is first used.
"""

from typing import TYPE_CHECKING, Any

from edge_node.experts.memory import (
    check_memory,
    fitting,
    largest,
    loaded_bytes,
    needed_bytes,
    return_freed_memory,
    room_bytes,
)

if TYPE_CHECKING:
    from edge_node.experts.runtime import ExpertRuntime

__all__ = [
    "ExpertRuntime",
    "check_memory",
    "fitting",
    "largest",
    "loaded_bytes",
    "needed_bytes",
    "return_freed_memory",
    "room_bytes",
]


def __getattr__(name: str) -> Any:
    if name == "ExpertRuntime":
        from edge_node.experts.runtime import ExpertRuntime

        return ExpertRuntime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
