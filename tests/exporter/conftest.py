"""Checkpoints that several tests read and none changes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exporter.checkpoints import save_mixtral


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`mixtral(dtype, shard_size)`: a random checkpoint folder, saved once per kind."""
    made: dict[tuple[object, ...], Path] = {}

    def get(dtype: str = "bfloat16", shard_size: str = "1GB", layers: int = 2) -> Path:
        key = (dtype, shard_size, layers)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoints") / f"mixtral-{dtype}"
            save_mixtral(made[key], dtype, shard_size=shard_size, layers=layers)
        return made[key]

    return get
