"""Experts as onnxruntime wants them in memory, saved on the device, so that they are mapped instead of allocated.

onnxruntime rearranges quantised weights when a session starts, into anonymous memory beside the file's pages. Saved
once, the rearranged weights are pages of a file: the kernel shares them, drops them under pressure and reads them back.
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

_MODEL, _WEIGHTS = "expert.onnx", "expert.weights"


def prepacked_model(bundle: Path, entry: ExpertEntry, folder: Path) -> Path:
    """The prepacked copy of a verified expert, made at its first use.

    Copies are kept by the expert's hashes, onnxruntime's version and settings, and the processor, since each decides
    the arrangement.

    Raises:
        BundleError: onnxruntime can't load the expert.
        StorageError: there is no room in `folder`, or no right to write.
    """
    decisive = [*(f.sha256 for f in entry.files), ort.__version__, *EXACT_SUMS, platform.machine(), processor()]
    key = hashlib.sha256("\n".join(decisive).encode()).hexdigest()
    target = folder / key
    if not target.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=folder, ignore_cleanup_errors=True) as part:
                _save(bundle / entry.files[0].path, Path(part) / "whole")
                # A power cut must not leave a copy under its name without what is in it.
                for path in (*(Path(part) / "whole").iterdir(), Path(part) / "whole"):
                    sync(path)
                (Path(part) / "whole").rename(target)
        except OSError as error:
            if not target.exists():  # else another process was faster
                raise StorageError(f"can't keep prepacked experts in {folder}: {error.strerror or error}") from None
    return target / _MODEL


def discard(model: Path) -> None:
    """Remove a copy that is of no use, so that the next `prepacked_model` makes it again.

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
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*EXACT_SUMS)
    options.optimized_model_filepath = os.fspath(folder / _MODEL)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    options.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    try:
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001
        # onnxruntime raises a dozen unrelated classes, all for the same reason: not a loadable model.
        raise BundleError(f"{model} can't be prepacked by onnxruntime: {str(error).partition(chr(10))[0]}") from None


def processor() -> str:
    """What tells processors apart: the features that kernels are chosen by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
