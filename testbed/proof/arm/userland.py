"""A folder with Debian's Python for arm64 and the node's aarch64 wheels. It is made once, without root.

apt downloads the packages with a separate state, so this system's packages do not change, but with the system's mirrors
and signature checks.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.child_output import c_locale, run_parsed
from exporter.errors import DownloadError
from testbed.errors import EmulationError
from testbed.proof.arm.boards import BOARDS, Board

_ROOT = Path(__file__).resolve().parents[3]
# The wheels need libstdc++6 without declaring it; every system image has it.
_PACKAGES = ("python3", "libstdc++6")
_OURS = ("common", "wire", "edge_node")
_OLDEST_GLIBC = 17
_APT_TIMEOUT_S, _PIP_TIMEOUT_S, _FIRST_RUN_TIMEOUT_S = 300, 600, 120


@dataclass(frozen=True, slots=True)
class Userland:
    """Emulator and files of the userland.

    Attributes:
        qemu: path of the emulator.
        folder: contains `system`, `packages` and a folder per board.
    """

    qemu: str
    folder: Path

    def python(self, board: Board) -> list[str]:
        """Command that runs arm64 Python on a board; use it with the variables of `environment`."""
        python = next((self.folder / "system/usr/bin").glob("python3.[0-9]*"))
        return [self.qemu, "-L", str(self.folder / board.name), "-cpu", board.cpu, str(python)]

    def environment(self, code: Path) -> dict[str, str]:
        """Environment variables for the command `python`.

        Args:
            code: folder that `link_our_code` returned.
        """
        # Byte code would otherwise be written into the checkout.
        return {"PYTHONPATH": f"{self.folder / 'packages'}:{code}", "PYTHONDONTWRITEBYTECODE": "1"}

    def qemu_version(self) -> str:
        """First line of `qemu --version`."""
        done = run_parsed([self.qemu, "--version"], timeout_s=10)
        done.check_returncode()
        return done.stdout.partition("\n")[0]

    def wheels(self) -> dict[str, str]:
        """Version and wheel tag of each installed distribution, by name."""
        found = {}
        for info in sorted((self.folder / "packages").glob("*.dist-info")):
            name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
            tags = [line[5:] for line in (info / "WHEEL").read_text().splitlines() if line.startswith("Tag: ")]
            found[name] = f"{version} {tags[0]}"
        return found


def link_our_code(folder: Path) -> Path:
    """Make a folder with links to those packages of this checkout that a node imports, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in _OURS:
        link = folder / package
        link.unlink(missing_ok=True)
        link.symlink_to(_ROOT / package)
    return folder


def prepare(cache: Path, *, apt_sources: Path | None = None, on_progress: Callable[[str], None]) -> Userland:
    """Make the userland in `cache`, unless it is there already.

    Args:
        apt_sources: apt's list of sources with arm64; None for the system's own.
        on_progress: called with the name of each step.

    Raises:
        EmulationError: qemu or Debian's tools are missing, this is not a clone, or arm64 Python does not run.
        DownloadError: packages or wheels can't be downloaded.
    """
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    missing = [p for p in ("apt-get", "dpkg-deb") if shutil.which(p) is None] + ([] if qemu else ["qemu-aarch64"])
    if missing or qemu is None:
        raise EmulationError(
            f"{', '.join(missing)} not found: emulation needs Debian or similar, and 'apt install qemu-user-static'"
        )
    try:
        project, constraints = ((_ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    except FileNotFoundError as error:
        raise EmulationError(f"{error.filename} not found: emulation needs a clone of the repository") from None
    boards = "".join(f"{board}\n{board.cpuinfo()}" for board in BOARDS).encode()
    key = hashlib.sha256(b"\0".join([project, constraints, boards, *map(str.encode, _PACKAGES)])).hexdigest()[:16]
    done = Userland(qemu, cache / f"arm64-{key}")
    if not done.folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=cache, ignore_cleanup_errors=True) as part:
            made = Userland(qemu, Path(part) / "whole")
            on_progress("Debian packages for arm64")
            _unpack_system(Path(part), made.folder / "system", apt_sources)
            for board in BOARDS:
                _make_board(made.folder, board)
            on_progress("aarch64 wheels")
            _install_wheels(made, project)
            if not done.folder.exists():  # else another process was faster
                made.folder.rename(done.folder)
    return done


def _unpack_system(work: Path, system: Path, apt_sources: Path | None) -> None:
    state, archives = work / "state", work / "cache/archives"
    for folder in (state / "lists/partial", archives / "partial", system):
        folder.mkdir(parents=True)
    (work / "status").touch()  # an empty list of installed packages: apt downloads all dependencies
    config = work / "apt.conf"
    lines = [
        'APT::Architecture "arm64";', 'APT::Architectures { "arm64"; };', 'Acquire::Languages "none";',
        'APT::Sandbox::User "";', 'APT::Update::Post-Invoke "";', f'Dir::State "{state}";',
        f'Dir::State::status "{work / "status"}";', f'Dir::Cache "{work / "cache"}";',
    ]  # fmt: skip
    if apt_sources:
        lines += [f'Dir::Etc::sourcelist "{apt_sources.resolve()}";', 'Dir::Etc::sourceparts "/dev/null";']
    config.write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}
    install = ["install", "--download-only", "--yes", "--no-install-recommends", *_PACKAGES]
    for arguments in (["update"], install):
        _download(["apt-get", "-qq", *arguments], "apt-get", _APT_TIMEOUT_S, environment)
    for package in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, system], check=True, timeout=60)


def _make_board(folder: Path, board: Board) -> None:
    """Make the root folder for `qemu -L`: links to the system, and the board's own files in /proc."""
    root = folder / board.name
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(board.cpuinfo())
    (root / "proc/device-tree/model").write_text(f"{board.model}\0")
    for entry in sorted((folder / "system").iterdir()):
        if entry.name != "proc":
            (root / entry.name).symlink_to(Path("../system") / entry.name)


def _install_wheels(made: Userland, project: bytes) -> None:
    tables = tomllib.loads(project.decode())["project"]
    version, glibc = _first_run(made)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(_OLDEST_GLIBC, glibc + 1)]
    _download(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--target", str(made.folder / "packages"), "--only-binary=:all:", f"--python-version={version}"),
            *(*platforms, "--platform=manylinux2014_aarch64", "-c", str(_ROOT / "constraints.txt")),
            *tables["dependencies"],
            *tables["optional-dependencies"]["edge"],
        ],
        "pip",
        _PIP_TIMEOUT_S,
        c_locale(),
    )


def _first_run(made: Userland) -> tuple[str, int]:
    """Run the arm64 Python; return its version and the minor version of its glibc."""
    code = "import os, sys; print('%d.%d' % sys.version_info[:2], os.confstr('CS_GNU_LIBC_VERSION'))"
    command = [*made.python(BOARDS[0]), "-c", code]
    try:
        done = run_parsed(command, timeout_s=_FIRST_RUN_TIMEOUT_S)
        done.check_returncode()
    except (subprocess.SubprocessError, OSError) as error:
        raise EmulationError(f"arm64 Python does not run under {made.qemu}: {error}") from None
    version, _, libc = done.stdout.split()
    return version, int(libc.split(".")[1])


def _download(command: Sequence[str], tool: str, timeout_s: float, environment: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=timeout_s,
            env=environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DownloadError(f"{tool} did not end within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        said = next((line for line in lines if line.lower().startswith(("e:", "error"))), lines[-1])
        hint = ": if this system's sources have no arm64, give a list with --apt-sources" if tool == "apt-get" else ""
        raise DownloadError(f"{tool} could not download the arm64 packages ({said.strip()}){hint}")
