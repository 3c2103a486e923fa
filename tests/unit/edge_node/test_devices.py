"""Devices are recognised by what their kernels say; a GPU that does not prove itself leaves the CPU and a reason."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node import devices
from edge_node.devices import DetectedDevice
from edge_node.errors import ProviderError
from edge_node.experts.providers import first_that_proves, unavailable
from edge_node.experts.runtime import ExpertRuntime
from edge_node.experts.session import ExpertSession
from exporter.expert.presets import choose_quantisation
from wire.device_profiles import PROFILES, DeviceName, Provider
from wire.experts import ExpertId
from wire.manifest import Manifest, Scheme, load_manifest

CORTEX_A72 = "Features\t: fp asimd evtstrm crc32 cpuid\n"
CORTEX_A76 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid lrcpc dcpop asimddp\n"


def _board(root: Path, model: str, features: str, release: str = "") -> Path:
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "etc").mkdir()
    if model:
        (root / "proc/device-tree/model").write_text(model + "\0")
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nBogoMIPS\t: 108.00\n{features}CPU implementer\t: 0x41\n")
    if release:
        (root / "etc/nv_tegra_release").write_text(release)
    return root


@pytest.mark.parametrize(
    ("model", "features", "release", "name", "dot_product"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", CORTEX_A76, "", "pi5", True),
        ("Raspberry Pi Compute Module 5 Rev 1.0", CORTEX_A76, "", "pi5", True),
        ("Raspberry Pi 500 Rev 1.0", CORTEX_A76, "", "pi5", True),
        ("Raspberry Pi 4 Model B Rev 1.4", CORTEX_A72, "", "pi4", False),
        ("Raspberry Pi 400 Rev 1.0", CORTEX_A72, "", "pi4", False),
        ("Raspberry Pi 3 Model B Plus Rev 1.3", CORTEX_A72, "", "generic-arm64", False),
        ("NVIDIA Jetson Orin Nano Developer Kit", CORTEX_A76, "# R36 (release), REVISION: 4.3\n", "jetson-orin", True),
        ("NVIDIA Jetson AGX Orin Developer Kit", CORTEX_A76, "# R35 (release), REVISION: 4.1\n", "jetson-orin", True),
        ("", CORTEX_A76, "# R36 (release), REVISION: 4.3\n", "jetson-orin", True),  # in a container
        (
            "NVIDIA Jetson Xavier NX Developer Kit",
            CORTEX_A76,
            "# R35 (release), REVISION: 4.1\n",
            "generic-arm64",
            True,
        ),
        ("Radxa ROCK 5B", CORTEX_A76, "", "generic-arm64", True),
        ("", "", "", "generic-arm64", None),
    ],
)
def test_boards(
    tmp_path: Path, model: str, features: str, release: str, name: DeviceName, dot_product: bool | None
) -> None:
    root = _board(tmp_path, model, features, release)
    found = devices.detect(root, "aarch64")
    assert (found.name, found.dot_product) == (name, dot_product)
    assert found.because


def test_this_machine_is_something() -> None:
    found = devices.detect()
    assert found.name == ("x86" if os.uname().machine == "x86_64" else found.name)
    assert 1 <= devices.threads_for(found) <= len(os.sched_getaffinity(0))


def test_only_the_fast_cores_count(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    for i, cpu in enumerate(mine):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text("1024\n" if i == 0 else "410\n")
    assert devices.threads_for(DetectedDevice("generic-arm64", "test"), tmp_path) == 1


@pytest.mark.parametrize(
    ("device", "scheme", "advised"),
    [
        (DetectedDevice("pi4", "", False), "int4", True),
        (DetectedDevice("pi4", "", False), "int8", True),
        (DetectedDevice("pi4", "", False), "int8-dynamic", False),
        (DetectedDevice("generic-arm64", "", False), "int4", True),
        (DetectedDevice("generic-arm64", "", True), "int4", False),
        (DetectedDevice("pi5", "", True), "int4", False),
        (DetectedDevice("pi5", "", True), "fp32", True),
        (DetectedDevice("x86", ""), "int4", False),
    ],
)
def test_a_quantisation_that_does_not_suit_is_said(device: DetectedDevice, scheme: Scheme, advised: bool) -> None:
    assert bool(devices.advice(device, scheme)) == advised


@pytest.mark.parametrize("name", PROFILES)
def test_the_exporter_s_choice_suits_the_node(name: DeviceName) -> None:
    quantisation, said = choose_quantisation(name, None, None, False)
    assert name in said
    assert not devices.advice(DetectedDevice(name, "", name != "pi4"), quantisation.scheme)
    assert PROFILES[name].providers[-1] == "cpu"


@pytest.mark.skipif(not unavailable("cuda"), reason="this onnxruntime has CUDA")
def test_a_gpu_that_is_not_there(tiny_bundle: Callable[[Scheme], Path]) -> None:
    bundle = tiny_bundle("fp32")
    manifest = load_manifest(bundle)
    id = manifest.experts[0].id

    def load(provider: Provider) -> ExpertRuntime:
        return ExpertRuntime(bundle, manifest, [id], provider=provider)

    runtime, chosen = first_that_proves(["tensorrt", "cuda", "cpu"], load)
    assert chosen.provider == "cpu"
    assert "tensorrt: this onnxruntime has no TensorrtExecutionProvider" in chosen.reason
    assert "cuda: this onnxruntime has no CUDAExecutionProvider" in chosen.reason
    assert runtime.ids == (id,)


@pytest.mark.skipif(not unavailable("cuda"), reason="this onnxruntime has CUDA")
def test_a_session_never_falls_back_to_the_cpu_in_silence(tiny_bundle: Callable[[Scheme], Path]) -> None:
    bundle = tiny_bundle("fp32")
    manifest = load_manifest(bundle)
    with pytest.raises(ProviderError):
        ExpertSession(bundle / manifest.experts[0].files[0].path, manifest.dims.hidden, "cuda")
    with pytest.raises(ProviderError):
        ExpertRuntime(bundle, manifest, [manifest.experts[0].id], provider="cuda")


@pytest.mark.skipif(bool(unavailable("cuda")), reason="needs an onnxruntime with CUDA, and a GPU")
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int4", "int8"])
def test_a_gpu_proves_itself(tiny_bundle: Callable[[Scheme], Path], scheme: Scheme) -> None:
    bundle = tiny_bundle(scheme)
    manifest: Manifest = load_manifest(bundle)
    ids = [ExpertId(0, 0), ExpertId(1, 7)]
    _, chosen = first_that_proves(["cuda", "cpu"], lambda p: ExpertRuntime(bundle, manifest, ids, provider=p))
    assert chosen == ("cuda", "")
