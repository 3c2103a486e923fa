"""RAM under the limits of cgroups."""

from pathlib import Path
from typing import Any

import pytest

from common import memory


def _limit(group: Path, most: int | str, current: int, stat: str | None = None) -> None:
    """What the kernel shows of a cgroup."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").unlink(missing_ok=True)
    if stat is not None:
        (group / "memory.stat").write_text(stat)


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's cgroup, two below `tmp_path`."""
    real = Path.read_text
    said = "1:name=systemd:/\n0::/wdmoe.slice/node.service\n"

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        return said if self == Path("/proc/self/cgroup") else real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    return tmp_path / "wdmoe.slice/node.service"


def test_a_cgroup_limit_counts(cgroup: Path, tmp_path: Path) -> None:
    assert memory._cgroup_free_bytes(tmp_path) is None
    _limit(cgroup, 1000, 400)
    assert memory._cgroup_free_bytes(tmp_path) == 600
    _limit(cgroup, "max", 400)
    assert memory._cgroup_free_bytes(tmp_path) is None


_STAT = "anon {anon}\nfile {file}\nshmem {shmem}\ninactive_anon 50\ninactive_file {inactive}\nactive_file {active}\n"


@pytest.mark.parametrize(
    ("current", "stat", "free"),
    [
        # The cache has filled the cgroup up: experts that were read once.
        (1000, _STAT.format(anon=100, file=900, shmem=0, inactive=600, active=300), 900),
        # A tmpfs is "file" as well, but on the lists of what can't be dropped.
        (1000, _STAT.format(anon=100, file=900, shmem=500, inactive=300, active=100), 400),
        (1000, _STAT.format(anon=1000, file=0, shmem=0, inactive=0, active=0), 0),
        # The counters are not all of the same moment.
        (300, _STAT.format(anon=0, file=400, shmem=0, inactive=300, active=100), 1000),
        (1000, None, 0),
        (1000, "", 0),
        (1000, "inactive_file\n", 0),
        (1000, "inactive_file many\n", 0),
    ],
)
def test_page_cache_is_free_memory(cgroup: Path, tmp_path: Path, current: int, stat: str | None, free: int) -> None:
    _limit(cgroup, 1000, current, stat)
    assert memory._cgroup_free_bytes(tmp_path) == free


def test_the_tightest_of_nested_cgroups_counts(cgroup: Path, tmp_path: Path) -> None:
    _limit(cgroup.parent, 1000, 900, "inactive_file 100\nactive_file 200\n")
    assert memory._cgroup_free_bytes(tmp_path) == 400
    _limit(cgroup, 500, 500, "inactive_file 150\nactive_file 0\n")
    assert memory._cgroup_free_bytes(tmp_path) == 150
    _limit(cgroup, "max", 500, "inactive_file 150\nactive_file 0\n")
    assert memory._cgroup_free_bytes(tmp_path) == 400
