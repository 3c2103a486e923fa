"""Bundles whose files are links, as git-annex, DVC and download caches keep them."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_node.experts.runtime import ExpertRuntime
from exporter.expert.probe import check_probe, probe_tolerance
from wire.manifest import load_manifest
from wire.probe import probe_input

Layout = Callable[[Path, str], Path]


def _folder_of_its_own(store: Path, name: str) -> Path:
    return store / name / name


def _one_store(store: Path, name: str) -> Path:
    return store / name


def _weights_elsewhere(store: Path, name: str) -> Path:
    return store / "graphs" / name if name.endswith("0") else store / "other" / name


@pytest.mark.parametrize("layout", [_folder_of_its_own, _one_store, _weights_elsewhere])
def test_a_bundle_of_links_computes_the_same(layout: Layout, random_bundle: Path, tmp_path: Path) -> None:
    linked = tmp_path / "bundle of links"
    shutil.copytree(random_bundle, linked)
    for path in sorted(path for path in linked.rglob("*") if path.is_file()):
        target = layout(tmp_path / "store", hashlib.sha256(path.read_bytes()).hexdigest())
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        path.symlink_to(target)
    manifest = load_manifest(linked)
    entry = manifest.experts[0]
    x = probe_input(manifest.dims.hidden, 3)
    expected = ExpertRuntime(random_bundle, manifest, [entry.id]).run(entry.id, x).copy()
    assert np.array_equal(ExpertRuntime(linked, manifest, [entry.id]).run(entry.id, x), expected)
    prepacked = ExpertRuntime(linked, manifest, [entry.id], prepacked=tmp_path / "prepacked")
    assert np.array_equal(prepacked.run(entry.id, x), expected)
    check_probe(linked, entry, manifest.dims.hidden, probe_tolerance(manifest.quantisation))
