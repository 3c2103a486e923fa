"""Checkpoints by their hub id, downloaded by the hub's own library over real sockets from a hub on loopback."""

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from exporter.checkpoint.hub import fetch_checkpoint, locate_checkpoint
from exporter.checkpoint.source_file import source_name
from exporter.errors import CheckpointError, DownloadError
from tests.checkpoints import copy_checkpoint, edit_config
from tests.conftest import Run
from tests.hub_server import COMMIT, Hub, serving, use_hub
from wire.manifest import load_manifest

ID = "someone/tiny-moe"


@pytest.fixture
def hub(mixtral: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model in shards, among files that no export needs; the library uses it, and an empty cache."""
    folder = copy_checkpoint(mixtral(shard_size="100KB"), tmp_path / "on-the-hub")
    for name in (
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "tiny-Q4_K_M.gguf",
        "README.md",
        "other.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    hub = Hub({ID: folder})
    monkeypatch.chdir(tmp_path)
    with serving(hub) as url:
        use_hub(url, tmp_path, monkeypatch)
        yield hub


class Shown(NamedTuple):
    """What a download showed of its progress."""

    stage: str
    fraction: float


def fetch(**options: object) -> tuple[Path, list[Shown]]:
    shown: list[Shown] = []
    folder = fetch_checkpoint(ID, progress=lambda *what: shown.append(Shown(*what)), **options)  # type: ignore[arg-type]
    return folder, shown


def test_a_bundle_from_a_hub_id_has_what_is_needed_and_is_named_by_the_id(hub: Hub, tmp_path: Path, run: Run) -> None:
    result = run("exporter", "bundle", ID, tmp_path / "bundle", "--jobs", "1")
    assert result.returncode == 0, result.stderr
    shards = sorted(path.name for path in hub.models[ID].glob("model-*.safetensors"))
    assert len(shards) > 2
    texts = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert sorted(hub.downloaded()) == sorted({*shards, *texts})
    assert "download: " in result.stderr
    assert "KiB of " in result.stderr
    assert load_manifest(tmp_path / "bundle").source.name == ID
    assert COMMIT not in (tmp_path / "bundle/manifest.json").read_text()
    # The snapshot in the cache is a folder like any other, and gives the same bundle.
    snapshot = tmp_path / f"cache/models--someone--tiny-moe/snapshots/{COMMIT}"
    assert run("exporter", "bundle", snapshot, tmp_path / "bundle").stdout.count("is up to date") == 1


def test_progress_is_shown_where_the_librarys_bars_are_switched_off(hub: Hub) -> None:
    """As with HF_HUB_DISABLE_PROGRESS_BARS, or after transformers has switched off its own."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        _, shown = fetch()
    finally:
        enable_progress_bars()
    assert shown[-1].fraction == 1.0


def test_complete_files_are_not_downloaded_again(hub: Hub) -> None:
    folder, shown = fetch()
    assert shown[-1].fraction == 1.0
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.resolve().unlink()
    lost.unlink()
    hub.requests.clear()
    assert fetch()[0] == folder
    assert hub.downloaded() == [lost.name]


def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.break_at = 90_000
    folder, shown = fetch()
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in hub.models[ID].glob("model-*"))
    assert {first for _, _, first in hub.requests if first} == {"bytes=90000-"}
    assert max(s.fraction for s in shown) == 1.0


def test_without_the_hub_a_complete_copy_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = fetch()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        use_hub(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path, monkeypatch)
        assert fetch()[0] == folder
        assert f"no answer from the hub: using the copy in {folder}" in caplog.text
        next(folder.glob("model-*.safetensors")).unlink()
        with pytest.raises(
            DownloadError, match=r"no answer from http://127.* has no complete copy of someone/tiny-moe"
        ):
            fetch()


def test_offline_mode(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE is set, and .* has no complete copy of someone/tiny-moe"):
        fetch()


def test_a_failing_hub(hub: Hub) -> None:
    hub.status = 503
    with pytest.raises(DownloadError, match=r"no answer from http://127.* \(.*503.*\), and .*: check the network"):
        fetch()


def test_gated_and_private_models(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(ID)
    with pytest.raises(
        DownloadError, match=r"is gated: accept its terms at http.*/someone/tiny-moe, log in with 'hf auth"
    ):
        fetch()
    hub.gated.clear()
    hub.private.add(ID)
    with pytest.raises(
        DownloadError, match=r"shows no model someone/tiny-moe: check the spelling, or else it is private"
    ):
        fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DownloadError, match="the hub refused your token"):
        fetch()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (fetch()[0] / "config.json").is_file()


def test_revisions(hub: Hub, run: Run) -> None:
    assert fetch(revision="v1")[0].name == COMMIT
    assert fetch(revision=COMMIT)[0].name == COMMIT
    result = run("exporter", "bundle", ID, "out", "--revision", "v2")
    assert result.returncode == 13
    assert "someone/tiny-moe has no revision 'v2'" in result.stderr
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["download", "wdmoe-export"]


def test_what_can_not_be_exported_is_not_downloaded(hub: Hub, run: Run) -> None:
    edit_config(hub.models[ID], quantization_config={"quant_method": "gptq"})
    result = run("exporter", "bundle", ID, "out")
    assert result.returncode == 10
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_repositories_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    for path in hub.models[ID].glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"holds GGUF files.*: export the repository of the model that it was made"
    ):
        fetch()
    hub.base_models[ID] = "someone/original"
    with pytest.raises(CheckpointError, match=r"holds GGUF files.*: export someone/original, which it was made from"):
        fetch()
    next(hub.models[ID].glob("*.gguf")).unlink()
    with pytest.raises(CheckpointError, match="holds pickled weights only: choose a --revision with safetensors"):
        fetch()
    shutil.rmtree(hub.models[ID])
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        fetch()


def test_layers_that_the_model_lacks_are_noticed_before_the_weights(hub: Hub, run: Run) -> None:
    result = run("exporter", "bundle", ID, "out", "--layers", "7")
    assert result.returncode == 2
    assert "index 7 is out of range" in result.stderr
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


def test_too_little_room_is_noticed_before_the_weights(hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 300_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage)
    result = run("exporter", "bundle", ID, "out")
    assert result.returncode == 12
    assert "has 293.0 KiB free, but the download needs" in result.stderr
    assert "KiB and the bundle needs" in result.stderr
    assert not any(name.endswith(".safetensors") for name in hub.downloaded())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", r"\./nothing is not a folder: give the folder that holds config.json, or a hub id"),
        ("/no/such/place", "is not a folder: give the folder"),
        ("~/nothing-there", "is not a folder"),
        ("one-word", "is not a folder: give the folder that holds config.json, or a hub id such as"),
        ("model.gguf", "model.gguf is a GGUF file.*: export the model that it was made from"),
        ("file.txt", "file.txt is not a folder"),
        ("models/tiny", "models/tiny is not a folder, but models is one: correct the path, or add --revision main"),
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        locate_checkpoint(name, revision=None, progress=lambda *_: None)


def test_a_folder_goes_before_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / ID).mkdir(parents=True)
    assert locate_checkpoint(ID, revision=None, progress=lambda *_: None) == Path(ID)
    with pytest.raises(CheckpointError, match="--revision is for checkpoints on the hub"):
        locate_checkpoint(ID, revision="main", progress=lambda *_: None)
    assert hub.requests == []
    # A folder of that owner's name makes the id unclear, until a revision shows what is meant.
    (tmp_path / ID).rmdir()
    assert locate_checkpoint(ID, revision="main", progress=lambda *_: None).name == COMMIT


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("somewhere/model", "model"),
        (f"hub/models--Qwen--Qwen3-30B-A3B/snapshots/{COMMIT}", "Qwen/Qwen3-30B-A3B"),
        (f"hub/models--gpt2/snapshots/{COMMIT}", "gpt2"),
        ("snapshots/model", "model"),
    ],
)
def test_names_of_sources(folder: str, name: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert source_name(tmp_path / folder) == name
