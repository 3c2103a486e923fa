"""Runs an exported expert in onnxruntime and compares its output with the one recorded at export."""

from pathlib import Path

import numpy as np

from wire.errors import BundleError, ProbeError
from wire.manifest import ExpertEntry, Quantisation
from wire.onnx_session import expert_options, open_session
from wire.probe import probe_error, probe_input
from wire.tensors import Array

# Rows with which the output error of an expert is measured; the manifest entry stores the output of row 0.
PROBE_ROWS = 8


def probe_tolerance(quantisation: Quantisation) -> float:
    """Largest ‖here − there‖ / ‖there‖ of a probe output between healthy devices.

    Every value covers the rounding of the stored output to fp16 (about 3e-4). Of block kernels, those that round
    activations to 8 bits per block agree between ARM and x86 to 1e-3, symmetric ones only to 0.026, because the ARM
    kernel rounds per row. ARM processors without dot product leave activations as they are, which moves outputs by
    0.012, an order of magnitude less than what rounding the weights to 4 bits does. With int8-dynamic a difference
    in the last bit of an activation's scale moves many codes by one.
    """
    match quantisation.scheme:
        case "fp32" | "fp16":
            return 1e-3
        case "int4" | "int8":
            return 0.06 if quantisation.symmetric else 0.03
        case "int8-dynamic":
            return 0.03


def run_rows(graph: Path, inputs: Array, threads: int = 1, *, together: bool = False) -> Array:
    """Outputs [rows, hidden] of an expert's graph file for inputs [rows, hidden].

    The first row always has a call of its own, because it proves the expert on devices, and a row's output may depend
    on those beside it.

    Args:
        together: whether the other rows share one call, which reads the weights once; otherwise each has its own.
            Not for int8-dynamic, where all rows of a call share the scale of the activations.

    Raises:
        BundleError: onnxruntime can't load or run the graph.
    """
    options = expert_options(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = open_session(graph, options)
        batches = [inputs[:1], inputs[1:]] if together and len(inputs) > 1 else np.split(inputs, len(inputs))
        outputs: list[Array] = [session.run(["y"], {"x": batch})[0] for batch in batches]
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a dozen unrelated types
        raise BundleError(f"onnxruntime can't run {graph}: {error}") from None
    return np.concatenate(outputs)


def relative_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖ over all values; 0 if both are zero."""
    scale = float(np.linalg.norm(expected))
    distance = float(np.linalg.norm(found - expected))
    if distance == 0.0:
        return 0.0
    return distance / scale if scale > 0.0 else float("inf")


def check_probe(bundle: Path, entry: ExpertEntry, hidden: int, tolerance: float) -> float:
    """Relative error of an expert's probe output on this machine.

    Raises:
        ProbeError: the error exceeds `tolerance`.
        BundleError: the graph can't be loaded, or the stored output is malformed.
    """
    error = probe_error(entry.probe_output, run_rows(bundle / entry.files[0].path, probe_input(hidden))[0])
    # Written as a negation so that NaN fails too.
    if not error <= tolerance:
        raise ProbeError(
            f"expert {entry.name} computes something else here than where it was exported "
            f"(relative difference {error:.2g}, at most {tolerance:.2g} expected)"
        )
    return error
