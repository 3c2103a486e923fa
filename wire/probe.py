"""How a device proves that it computes an expert as the exporter did: a fixed input, and what is kept of its output."""

import base64

import numpy as np

from wire.errors import BundleError
from wire.tensors import Array

PROBE_VALUES = 256
"""Values of a probe output that a manifest keeps at most."""


def probe_input(hidden: int, rows: int = 1) -> Array:
    """The input, float32 [rows, hidden], with which exported experts are proven.

    It has about unit variance and needs no library's random numbers, so it is the same on every device and in every
    version.
    """
    index = np.arange(rows * hidden, dtype=np.uint64)
    # SplitMix64 from seed 0 (Steele et al. 2014): integer arithmetic modulo 2⁶⁴, exact everywhere.
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    uniform = (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return ((uniform - np.float32(0.5)) * np.float32(12**0.5)).reshape(rows, hidden)


def encode_probe_output(output: Array) -> str:
    """`ExpertEntry.probe_output` of a float32 [hidden] output.

    An output of more than `PROBE_VALUES` values is folded to as many: value i is added to sum i mod `PROBE_VALUES` with
    the sign of value i of the second row of `probe_input`. Distances between folded outputs are those between the
    outputs to about 5 % (AMS sketch, Alon et al. 1996; Charikar et al. 2002). All outputs together would make a
    manifest of 6,144 experts of hidden size 2,048 five times as large.
    """
    return base64.b64encode(_fold(output).astype("<f2").tobytes()).decode()


def probe_error(probe_output: str, output: Array) -> float:
    """‖output − expected‖ / ‖expected‖ of a float32 [hidden] output, by what `ExpertEntry.probe_output` keeps of the
    expected one; ‖output‖ if zeros are expected.

    Raises:
        BundleError: `probe_output` is damaged.
    """
    expected = decode_probe_output(probe_output, len(output))
    found = output if len(expected) == len(output) else _fold(output)
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / (size or 1.0)


def decode_probe_output(text: str, hidden: int) -> Array:
    """The float32 values in `ExpertEntry.probe_output`: all of [hidden], or the folded [`PROBE_VALUES`].

    Manifests of schema 1 have all.

    Raises:
        BundleError: not base64, or of another length.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BundleError(f"manifest: probe output is not base64 ({error})") from None
    if len(raw) not in (2 * hidden, 2 * min(hidden, PROBE_VALUES)):
        raise BundleError(f"manifest: probe output has {len(raw)} bytes, {2 * min(hidden, PROBE_VALUES)} expected")
    return np.frombuffer(raw, "<f2").astype(np.float32)


def _fold(output: Array) -> Array:
    """An output of at most `PROBE_VALUES` values: as it is, or folded."""
    if len(output) <= PROBE_VALUES:
        return output
    folded = np.zeros((-(-len(output) // PROBE_VALUES), PROBE_VALUES), np.float32)
    folded.reshape(-1)[: len(output)] = np.copysign(1, probe_input(len(output), rows=2)[1]) * output
    return np.asarray(folded.sum(axis=0), np.float32)
