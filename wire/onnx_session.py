"""Sessions of onnxruntime: one thread pool for those of a process, graphs whose weights are in a file beside them."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wire.errors import BundleError
from wire.manifest import EXACT_SUMS

if TYPE_CHECKING:
    import onnxruntime as ort


_shared_pool_threads: int | None = None


def share_thread_pool(threads: int) -> None:
    """Make all later sessions of this process share a pool of `threads` threads.

    Only the first call with more than one thread has an effect: onnxruntime allows one pool. A single thread needs no
    pool.
    """
    global _shared_pool_threads
    import onnxruntime as ort

    if _shared_pool_threads is None and threads > 1:
        ort.set_global_thread_pool_sizes(threads, 1)
        _shared_pool_threads = threads


def session_options(threads: int = 1) -> "ort.SessionOptions":
    """Options of a session with `threads` threads of its own, or with the pool that this process' sessions share.

    Beside a shared pool, onnxruntime refuses sessions with threads of their own.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.use_per_session_threads = _shared_pool_threads is None
    options.intra_op_num_threads = 0 if _shared_pool_threads else threads
    options.log_severity_level = 3
    return options


def expert_options(threads: int = 1) -> "ort.SessionOptions":
    """Options with which an expert gives the same numbers wherever it runs; `threads` as in `session_options`."""
    options = session_options(threads)
    options.add_session_config_entry(*EXACT_SUMS)
    # Activations fit into one small buffer; an arena per session would only retain memory.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def open_session(
    model: Path, options: "ort.SessionOptions", providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> "ort.InferenceSession":
    """Load a graph whose weights, if it has any of its own, are in the file of the same name ending in `.weights`.

    onnxruntime refuses weights outside the graph's folder. Where files are links into folders of their own, as
    git-annex, DVC and download caches leave them, it gets the weights as mapped memory. Until the session is ready,
    this takes as much memory again as the weights; loading takes two to three times as long.

    Raises:
        BundleError: a file is a link, and this onnxruntime can't take weights from memory.
        Exception: onnxruntime can't load it; the classes are many and unrelated.
    """
    import onnxruntime as ort

    weights = model.with_suffix(".weights")
    if not weights.is_file() or weights.resolve().parent == model.resolve().parent:
        return ort.InferenceSession(model, options, providers=[*providers])
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        raise BundleError(
            f"{weights} is a link out of its folder: copy the bundle with 'cp -rL', or update onnxruntime"
        )
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        options.add_external_initializers_from_files_in_memory([weights.name], [mapped], [len(mapped)])
        return ort.InferenceSession(model.read_bytes(), options, providers=[*providers])
