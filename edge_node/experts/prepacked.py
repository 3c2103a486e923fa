"""Prepacked copies of experts: weights in onnxruntime's own arrangement, mapped from a file instead of allocated.

onnxruntime rearranges quantised weights when a session starts, in anonymous memory in addition to the file's pages.
Saved once, the rearranged weights are pages of a file: the kernel shares them, drops them under memory pressure and
reads them again.
"""

import hashlib
import os
import platform
import shutil
import tempfile
from pathlib import Path

import onnxruntime as ort

from common.errors import StorageError
from common.files import sync
from wire.errors import BundleError
from wire.manifest import EXACT_SUMS, ExpertEntry
from wire.onnx_session import expert_options, open_session

_MODEL, _WEIGHTS = "expert.onnx", "expert.weights"


def prepacked_model(bundle: Path, entry: ExpertEntry, folder: Path) -> Path:
    """Path of the prepacked model of a verified expert; it is made at first use.

    A copy's name is a hash of all that decides the arrangement: the expert's files, onnxruntime's version and settings,
    and the processor.

    Raises:
        BundleError: onnxruntime can't load the expert.
        StorageError: `folder` has no room or can't be written.
    """
    decisive = [*(f.sha256 for f in entry.files), ort.__version__, *EXACT_SUMS, platform.machine(), processor()]
    key = hashlib.sha256("\n".join(decisive).encode()).hexdigest()
    target = folder / key
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True) as part:
                _save(bundle / entry.files[0].path, Path(part) / "whole")
                # After a power cut, a copy under its final name must have its content.
                for path in (*(Path(part) / "whole").iterdir(), Path(part) / "whole"):
                    sync(path)
                (Path(part) / "whole").rename(target)
        except OSError as error:
            if not target.exists():  # if it does, another process was faster
                raise StorageError(f"can't keep prepacked experts in {folder}: {error.strerror or error}") from None
    return target / _MODEL


def discard(model: Path) -> None:
    """Remove a damaged copy; the next `prepacked_model` makes it again.

    Raises:
        StorageError: it can't be removed.
    """
    try:
        shutil.rmtree(model.parent)
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        raise StorageError(f"can't remove the prepacked copy {model.parent}: {error.strerror or error}") from None


def _save(model: Path, folder: Path) -> None:
    folder.mkdir()
    needed = 3 * sum(file.stat().st_size for file in model.parent.glob(f"{model.stem}.*"))
    if shutil.disk_usage(folder).free < needed:
        raise StorageError(f"{folder.parent.parent} has no room for a prepacked expert of about {needed >> 20} MiB")
    options = expert_options()
    options.optimized_model_filepath = os.fspath(folder / _MODEL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        open_session(model, options)
    except Exception as error:  # noqa: BLE001
        # onnxruntime raises a dozen unrelated classes for the same reason: the model can't be loaded.
        raise BundleError(f"{model} can't be prepacked by onnxruntime: {str(error).partition(chr(10))[0]}") from None


def processor() -> str:
    """The processor's features, by which onnxruntime chooses kernels; its name if they are unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
