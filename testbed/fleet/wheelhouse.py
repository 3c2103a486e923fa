"""Wheels for devices that need no internet and no compiler: downloaded here, for their CPU, Python and C library.

A wheelhouse is one folder per release and target:

    CACHE/0.1.0-3fa9c1d2e4b5/aarch64-cp311-glibc2.36-edge/
      *.whl               of everything, wdmoe and pip included
      requirements.txt    each with its SHA-256: `pip install --require-hashes` takes nothing else
    CACHE/0.1.0-3fa9c1d2e4b5/own/   our own wheel
    CACHE/dependencies-5b0c…/…/   the same files, under a second name, for the next release
"""

import fcntl
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

from msgspec import Meta, Struct

from exporter.errors import DownloadError
from testbed.errors import FleetError
from wire import __version__
from wire.manifest import sha256_file

LOCK = "requirements.txt"
_PACKAGES = ("common", "wire", "exporter", "edge_node", "bs_coordinator", "testbed")
_FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
_OLDEST_GLIBC_MINOR = 17
_PIP_S = 1800.0


class Target(Struct, frozen=True, kw_only=True):
    """What wheels must run on.

    Attributes:
        machine: as `uname -m` says.
        python: major and minor.
        glibc: major and minor of the C library.
        extra: of our own package: `edge` on nodes.
    """

    machine: Literal["aarch64", "x86_64"]
    python: Annotated[str, Meta(pattern=r"^3\.\d+$")]
    glibc: Annotated[str, Meta(pattern=r"^2\.\d+$")]
    extra: Literal["edge", "bs", "testbed"]

    def __str__(self) -> str:
        return f"{self.machine}-cp{self.python.replace('.', '')}-glibc{self.glibc}-{self.extra}"

    def platforms(self) -> list[str]:
        """Platform tags of wheels that run there (PEP 600), the newest first."""
        newest = int(self.glibc.split(".")[1])
        tags = [f"manylinux_2_{minor}_{self.machine}" for minor in range(newest, _OLDEST_GLIBC_MINOR - 1, -1)]
        return [*tags, f"manylinux2014_{self.machine}", f"linux_{self.machine}"]


class Wheelhouse(Struct, frozen=True):
    """Wheels of one release for one target.

    Attributes:
        release: names the code and its dependencies: equal for all targets of one checkout.
        changed: something had to be fetched, or would have to be.
    """

    folder: str
    release: str
    changed: bool


def source_root() -> Path:
    """The clone that this package runs from.

    Raises:
        FleetError: it runs from an installed wheel.
    """
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        raise FleetError("devices get what is in a clone of this repository: install it with 'pip install -e .[fleet]'")
    return root


def release_name(root: Path) -> str:
    """Version and content of a clone: every change of code, or of a dependency's version, is another release."""
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return f"{__version__}-{digest.hexdigest()[:12]}"


def wheelhouse(target: Target, cache: Path, root: Path, *, check: bool = False) -> Wheelhouse:
    """The wheels for a target, from the cache or fetched; with `check` only where they would be.

    Raises:
        DownloadError: pip finds no wheel of something for that target, or can't reach its index.
        StorageError: the cache can't be written.
    """
    release = release_name(root)
    folder = cache / release / str(target)
    if check:
        return Wheelhouse(str(folder), release, changed=not (folder / LOCK).is_file())
    with _alone(cache):
        if (folder / LOCK).is_file():
            return Wheelhouse(str(folder), release, changed=False)
        with _part(folder) as part:
            own = _own_wheel(cache / release, root)
            for wheel in (own, *_dependencies(target, cache, root, own).glob("*.whl")):
                os.link(wheel, part / wheel.name)
            (part / LOCK).write_text(lock(part.glob("*.whl")))
    return Wheelhouse(str(folder), release, changed=True)


def _own_wheel(folder: Path, root: Path) -> Path:
    """Our own code, the same for all targets."""
    built = folder / "own"
    if not built.is_dir():
        with _part(built) as part:
            _pip("wheel", "--no-deps", "--wheel-dir", str(part), str(root))
    (own,) = built.glob("wdmoe-*.whl")
    return own


def _dependencies(target: Target, cache: Path, root: Path, own: Path) -> Path:
    """A folder of all wheels but our own: releases that need the same ones share it."""
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
    """Requirements that name each wheel's version and SHA-256, in the format of pip's hash-checking mode."""
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S, check=False)
    except subprocess.TimeoutExpired:
        raise DownloadError(f"pip {arguments[0]} took more than {_PIP_S:.0f} s") from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise DownloadError(f"pip {arguments[0]}: {(errors or done.stderr.splitlines() or ['failed'])[-1]}")


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """While nobody else fills the cache: Ansible asks for all devices at once."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as file:
        # Whoever holds it ends by pip's own deadline.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the body succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        part = Path(temporary) / "wheels"
        part.mkdir()
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
