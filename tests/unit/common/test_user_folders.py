"""Homes and caches that are missing, odd or can't be written."""

from pathlib import Path

import pytest

from common.errors import StorageError
from common.files import atomic_write
from common.user_folders import Kind, describe, user_folder, user_path

KINDS: list[Kind] = ["cache", "config", "state"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_can_not_be_made_is_named_with_its_variable(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv(f"XDG_{kind.upper()}_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    reason = rf"Not a directory.*: XDG_{kind.upper()}_HOME can name another folder"
    with pytest.raises(StorageError, match=reason), user_folder(kind):
        pass
    monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", str(tmp_path / "other"))
    with user_folder(kind) as folder:
        assert folder.is_dir()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("odd", ["relative/folder", "."])
def test_relative_paths_are_ignored(kind: Kind, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", odd)  # as the XDG specification demands
    assert user_path(kind).is_absolute()


def test_what_can_not_be_written_into_the_folder_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "wdmoe").mkdir()
    (tmp_path / "wdmoe" / "models").touch()
    with (
        pytest.raises(StorageError, match="XDG_CACHE_HOME can name another folder"),
        user_folder("cache") as folder,
        atomic_write(folder / "models" / "x") as file,
    ):
        file.write(b"x")
    with pytest.raises(StorageError, match=r"^elsewhere$"), user_folder("cache"):
        raise StorageError("elsewhere")


@pytest.mark.parametrize("kind", KINDS)
def test_a_home_that_does_not_exist_and_can_not_be_made_is_a_reason(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system names the folder above that it could not make."""
    monkeypatch.delenv(f"XDG_{kind.upper()}_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/no-such-home")  # not even root can make it
    reason = rf"\(/proc/no-such-home\): XDG_{kind.upper()}_HOME can name another folder"
    with pytest.raises(StorageError, match=reason), user_folder(kind):
        pass
    with pytest.raises(StorageError) as raised, atomic_write(user_path(kind) / "deep" / "file"):
        pass
    assert str(describe(raised.value, kind)).endswith(f": XDG_{kind.upper()}_HOME can name another folder")
    assert describe(StorageError("elsewhere"), kind) is None
