"""Wheels for devices without internet or compiler: downloaded here for the device's CPU, Python and C library.

A wheelhouse is one folder per release and target:

    CACHE/0.1.0-3fa9c1d2e4b5/aarch64-cp311-glibc2.36-edge/
      *.whl               wdmoe, pip and all dependencies
      requirements.txt    SHA-256 of each: `pip install --require-hashes` accepts nothing else
    CACHE/0.1.0-3fa9c1d2e4b5/own/   the wdmoe wheel
    CACHE/dependencies-5b0c…/…/   hard links to the dependencies, for the next release
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from msgspec import Meta, Struct

from common.child_output import run_parsed
from exporter.errors import DownloadError
from testbed.errors import FleetError
from wire import __version__
from wire.manifest import sha256_file

LOCK = "requirements.txt"
_PACKAGES = ("common", "wire", "exporter", "edge_node", "bs_coordinator", "testbed", "wdmoe")
_FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
_OLDEST_GLIBC_MINOR = 17
_PIP_S = 1800.0


class Target(Struct, frozen=True, kw_only=True):
    """Kind of device that wheels must run on.

    Attributes:
        machine: as printed by `uname -m`.
        python: major and minor version.
        glibc: major and minor version of the C library.
        extra: extra of the wdmoe package to install: `edge` on nodes.
    """

    machine: Literal["aarch64", "x86_64"]
    python: Annotated[str, Meta(pattern=r"^3\.\d+$")]
    glibc: Annotated[str, Meta(pattern=r"^2\.\d+$")]
    extra: Literal["edge", "bs", "testbed"]

    def __str__(self) -> str:
        return f"{self.machine}-cp{self.python.replace('.', '')}-glibc{self.glibc}-{self.extra}"

    def platforms(self) -> list[str]:
        """Platform tags (PEP 600) of the wheels that run on this target, the newest first."""
        newest = int(self.glibc.split(".")[1])
        tags = [f"manylinux_2_{minor}_{self.machine}" for minor in range(newest, _OLDEST_GLIBC_MINOR - 1, -1)]
        return [*tags, f"manylinux2014_{self.machine}", f"linux_{self.machine}"]


class Wheelhouse(Struct, frozen=True):
    """Wheels of one release for one target.

    Attributes:
        folder: path of the folder of wheels.
        release: name of the code and its dependencies, equal for all targets of one checkout.
        changed: whether something had to be fetched, or with `check` would have to be.
    """

    folder: str
    release: str
    changed: bool


def source_root() -> Path:
    """Root folder of the clone that this package runs from.

    Raises:
        FleetError: the package runs from an installed wheel.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        raise FleetError("deployment needs a clone of this repository: run 'pip install -e .[fleet]' in it")
    return root


def release_name(root: Path) -> str:
    """Version and hash of a clone; changes with the code and with the versions of dependencies."""
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return f"{__version__}-{digest.hexdigest()[:12]}"


def wheelhouse(target: Target, cache: Path, root: Path, *, check: bool = False) -> Wheelhouse:
    """Return the wheels for a target, from the cache or fetched.

    Args:
        cache: folder that keeps wheels.
        root: root of the clone.
        check: fetch nothing, only return where the wheels would be.

    Raises:
        DownloadError: pip finds no wheel of a package for the target, or can't reach its index.
        StorageError: the cache can't be written.
    """
    release = release_name(root)
    folder = cache / release / str(target)
    if check:
        return Wheelhouse(str(folder), release, changed=not (folder / LOCK).is_file())
    cache.mkdir(parents=True, exist_ok=True)
    # Ansible calls this for all devices at once. Another holder of the lock ends by pip's own deadline.
    with FileLock(cache / ".lock"):
        if (folder / LOCK).is_file():
            return Wheelhouse(str(folder), release, changed=False)
        with _part(folder) as part:
            own = _own_wheel(cache / release, root)
            for wheel in (own, *_dependencies(target, cache, root, own).glob("*.whl")):
                os.link(wheel, part / wheel.name)
            (part / LOCK).write_text(lock(part.glob("*.whl")), encoding="utf-8")
    return Wheelhouse(str(folder), release, changed=True)


def _own_wheel(folder: Path, root: Path) -> Path:
    """The wdmoe wheel, which is the same for all targets."""
    built = folder / "own"
    if not built.is_dir():
        with _part(built) as part:
            _pip("wheel", "--no-deps", "--wheel-dir", str(part), str(root))
    (own,) = built.glob("wdmoe-*.whl")
    return own


def _dependencies(target: Target, cache: Path, root: Path, own: Path) -> Path:
    """A folder with all wheels except wdmoe's; releases with the same dependencies share it."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes())
    folder = cache / f"dependencies-{digest.hexdigest()[:12]}" / str(target)
    if not folder.is_dir():
        with _part(folder) as part:
            command = ["download", "--dest", str(part), "--only-binary", ":all:", "-c", str(root / "constraints.txt")]
            command += ["--implementation", "cp", "--python-version", target.python]
            tag = f"cp{target.python.replace('.', '')}"
            command += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
            command += [word for platform in target.platforms() for word in ("--platform", platform)]
            _pip(*command, f"{own}[{target.extra}]", "pip")
            (part / own.name).unlink()
    return folder


def lock(wheels: Iterable[Path]) -> str:
    """Requirements with version and SHA-256 of each wheel, in the format of pip's hash-checking mode."""
    lines = []
    for wheel in sorted(wheels):
        name, version, *_ = wheel.name.split("-")
        lines.append(f"{name}=={version} --hash=sha256:{sha256_file(wheel)}\n")
    return "".join(lines)


def _sources(root: Path) -> Iterator[Path]:
    yield from (root / name for name in _FILES)
    for package in _PACKAGES:
        yield from sorted(
            path for path in (root / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    try:
        done = run_parsed(command, timeout_s=_PIP_S)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"pip {arguments[0]} took more than {_PIP_S:.0f} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DownloadError(f"pip {arguments[0]}: {(errors or done.stderr.splitlines() or ['failed'])[-1]}")


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to `folder` if the body succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        part = Path(temporary) / "wheels"
        part.mkdir()
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
