"""Prepacked copies of experts: the same outputs, made once, made again for changed experts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_node.runtime import ExpertRuntime
from wire.manifest import Scheme, load_manifest, probe_input

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
