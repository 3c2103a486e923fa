"""Prepacked copies of experts: the same outputs, made once, made again when they are damaged."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from common.errors import StorageError
from edge_node.experts.runtime import ExpertRuntime
from wire.errors import ProbeError
from wire.manifest import Scheme, load_manifest
from wire.probe import probe_input

Bundle = Callable[[Scheme], Path]


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic"])
def test_a_prepacked_expert_answers_the_same_and_is_made_once(
    scheme: Scheme, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = tiny_bundle(scheme)
    manifest = load_manifest(bundle)
    ids = [entry.id for entry in manifest.experts[:2]]
    plain = ExpertRuntime(bundle, manifest, ids)
    first = ExpertRuntime(bundle, manifest, ids, prepacked=tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len([path for path in made if path.name == "expert.onnx"]) == 2
    again = ExpertRuntime(bundle, manifest, ids, prepacked=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == made
    x = probe_input(manifest.dims.hidden, 5)
    for id in ids:
        expected = plain.run(id, x).copy()
        assert np.array_equal(first.run(id, x), expected)
        assert np.array_equal(again.run(id, x), expected)


_GARBAGE = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("expert.weights", lambda content: b""),
        ("expert.weights", lambda content: content[: len(content) // 2]),
        ("expert.weights", lambda content: bytes(len(content))),
        ("expert.weights", lambda content: _GARBAGE.bytes(len(content))),
        ("expert.onnx", lambda content: b""),
        ("expert.onnx", lambda content: _GARBAGE.bytes(len(content))),
    ],
    ids=["no weights", "half of the weights", "zeros", "garbage", "no graph", "garbage for a graph"],
)
@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic"])
def test_a_damaged_copy_is_made_once_more(
    scheme: Scheme, name: str, damage: Callable[[bytes], bytes], tiny_bundle: Bundle, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    bundle = tiny_bundle(scheme)
    manifest = load_manifest(bundle)
    id = manifest.experts[0].id
    x = probe_input(manifest.dims.hidden, 5)
    expected = ExpertRuntime(bundle, manifest, [id], prepacked=tmp_path).run(id, x).copy()
    (file,) = tmp_path.glob(f"*/{name}")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        healed = ExpertRuntime(bundle, manifest, [id], prepacked=tmp_path)
    (line,) = caplog.messages
    assert line.startswith(f"the prepacked copy of expert {id} is damaged and is made again: ")
    assert "\n" not in line
    assert np.array_equal(healed.run(id, x), expected)
    (file,) = tmp_path.glob(f"*/{name}")
    assert file.stat().st_size == len(whole)
    caplog.clear()
    ExpertRuntime(bundle, manifest, [id], prepacked=tmp_path)
    assert not caplog.messages


def test_what_is_wrong_with_the_expert_itself_is_tried_twice_at_most(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("int4")
    manifest = load_manifest(bundle)
    first, second = manifest.experts[:2]
    swapped = msgspec.structs.replace(first, probe_output=second.probe_output)
    other = msgspec.structs.replace(manifest, experts=(swapped,))
    with caplog.at_level(logging.WARNING), pytest.raises(ProbeError, match="computes something else here"):
        ExpertRuntime(bundle, other, [first.id], prepacked=tmp_path)
    assert len(caplog.messages) == 1

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(StorageError, match=r"can't remove the prepacked copy .*: Permission denied"):
        ExpertRuntime(bundle, other, [first.id], prepacked=tmp_path)


def test_a_copy_is_on_disk_before_it_has_its_name(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle("int4")
    manifest = load_manifest(bundle)
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(fd: int) -> None:
        done.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    def noted_rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    ExpertRuntime(bundle, manifest, [manifest.experts[0].id], prepacked=tmp_path)
    assert sorted(done[:2]) == ["expert.onnx", "expert.weights"]
    assert done[2:] == ["whole", "rename"]
