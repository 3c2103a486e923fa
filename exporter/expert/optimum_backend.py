"""`--via optimum`: int8-dynamic experts made by Hugging Face optimum's ORTQuantizer and its presets.

Starts from the same fp32 graph as `--quant fp32`, so the two differ in the quantiser only. optimum-onnx
pins an older transformers than the rest of this project, hence an environment of its own. One expert is
held in memory several times while optimum works; the direct backend needs much less memory.
"""

import importlib.metadata
import importlib.util
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import WdmoeError
from exporter.checkpoint.slabs import SLAB_WEIGHTS
from exporter.expert.expert import ExpertJob, expert_paths, export_expert, open_writer
from exporter.expert.probe import PROBE_ROWS, relative_error, run_rows
from wire.device_profiles import DeviceName
from wire.manifest import ExpertEntry, Quantisation
from wire.probe import encode_probe_output, probe_input

_SETUP = (
    "--via optimum needs an environment of its own: run 'python3 -m venv .venvs/optimum', "
    "'.venvs/optimum/bin/pip install -e .[optimum]', then use .venvs/optimum/bin/wdmoe-export"
)


def require_optimum() -> str:
    """The installed version of optimum-onnx.

    Raises:
        WdmoeError: it is not installed; the message says how to make an environment with it.
    """
    try:
        version = importlib.metadata.version("optimum-onnx")
    except importlib.metadata.PackageNotFoundError:
        raise WdmoeError(_SETUP) from None
    if importlib.util.find_spec("optimum.onnxruntime") is None:
        raise WdmoeError(_SETUP)
    return version


def choose_preset(device: DeviceName | None) -> str:
    """Name of optimum's AutoQuantizationConfig preset for a device; for x86 and None, this machine's own."""
    if device not in (None, "x86") or platform.machine() in ("aarch64", "arm64"):
        return "arm64"
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    if "avx512_vnni" in flags:
        return "avx512_vnni"
    return "avx512" if "avx512f" in flags else "avx2"


def export_expert_with_optimum(job: ExpertJob) -> ExpertEntry:
    """As `export_expert`, with optimum's dynamic quantisation and the preset `job.preset`.

    Raises:
        WdmoeError: for the reasons of `export_expert`, or optimum is not installed.
    """
    require_optimum()
    graph_path, weights_path = expert_paths(job.id)
    with tempfile.TemporaryDirectory(prefix=".optimum-", suffix=".tmp", dir=job.out) as scratch:
        plain = replace(job, quantisation=Quantisation(scheme="fp32"), out=Path(scratch, "fp32"))
        exact = export_expert(plain)
        x = probe_input(job.dims.hidden, PROBE_ROWS)
        reference = run_rows(plain.out / graph_path, x, job.threads)
        made = _quantise(plain.out / graph_path, Path(scratch, "int8"), job.preset, Path(weights_path).name)
        with open_writer(job.out, weights_path) as weights, made.with_name("weights").open("rb") as source:
            while chunk := source.read(SLAB_WEIGHTS):
                weights.write(chunk)
        with open_writer(job.out, graph_path) as graph:
            graph.write(made.read_bytes())
    outputs = run_rows(job.out / graph_path, x, job.threads)
    return ExpertEntry(
        layer=job.id.layer,
        expert=job.id.expert,
        files=(graph.entry(), weights.entry()),
        probe_output=encode_probe_output(outputs[0]),
        error=relative_error(outputs, reference),
        source_sha256=exact.source_sha256,
    )


def _quantise(fp32: Path, folder: Path, preset: str, weights_name: str) -> Path:
    """Quantise a graph file; returns the new one, which has its weights in `weights` beside it."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    settings: dict[str, Any] = {"is_static": False, "per_channel": True}
    config = getattr(AutoQuantizationConfig, preset)(**settings)
    quantizer = ORTQuantizer.from_pretrained(fp32.parent, file_name=fp32.name)
    quantizer.quantize(save_dir=folder, quantization_config=config, file_suffix="")
    made = folder / fp32.name
    model = onnx.load(str(made))
    convert_model_to_external_data(model, location="weights", size_threshold=0)
    (folder / "split").mkdir()
    model = write_external_data_tensors(model, str(folder / "split"))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights_name
    graph = folder / "split" / fp32.name
    graph.write_bytes(model.SerializeToString(deterministic=True))
    return graph
