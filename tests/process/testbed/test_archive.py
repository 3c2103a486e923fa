"""Archives of runs: anonymous, complete, equal for equal runs; those of others are opened without trusting them."""

import io
import json
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import KeyFileError
from testbed.archive.dictionary import dictionary, dictionary_markdown
from testbed.archive.export import export_run
from testbed.archive.pseudonyms import Pseudonyms
from testbed.errors import ArchiveError
from testbed.run_directory.archive_file import CHECKSUMS, open_compressed
from testbed.run_directory.directory import RunDir
from testbed.run_directory.machine_tables import TELEMETRY
from testbed.run_directory.tables import ALL_TABLES
from testbed.run_directory.unpack import unpack
from tests.in_process import run_in_process
from wire.manifest import Scheme

KEY = b"k" * 32
SECRETS = ("Attic Net", "a4:cf:12:9b:00:7e", "192.168.7.23", "fd00:7::23", "anns-laptop", "pi-of-ann.local")
PLAN = """
name: shelf
bundles: [{bundle}]
nodes: 2
policies: [topk, top1]
repetitions: 1
warm_up_tokens: 1
workloads:
  - {{kind: generate, prompts: [Hello], max_tokens: 3}}
"""


@pytest.fixture(scope="module")
def finished(tiny_bundle: Callable[[Scheme], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A real small run, with the data that a run on a private Wi-Fi network would contain."""
    folder = tmp_path_factory.mktemp("archive")
    home = folder / "home" / "ann"
    home.mkdir(parents=True)
    (home / "plan.yaml").write_text(PLAN.format(bundle=tiny_bundle("int4")))
    done = run_in_process("testbed", "run", home / "plan.yaml", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    photo = folder / "IMG_1.jpg"
    exif = Image.Exif()
    exif[0x010F] = "AnnPhone"
    Image.new("RGB", (8, 8)).save(photo, exif=exif)
    note = run_in_process(
        "testbed", "note", folder / "run", "ann moved 192.168.7.23 behind Attic Net", "--photo", photo
    )
    assert note.returncode == 0, note.stderr
    found = RunDir(folder / "run")
    path = found.path / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["machine"]["host"] = "anns-laptop"
    manifest["broker"] = "mqtts://ann@pi-of-ann.local:8883"
    manifest["argv"] += ["--data", "/home/ann/data"]
    path.write_text(json.dumps(manifest))
    (found.path / "logs" / "node0.log").write_text(
        "anns-laptop: a4-CF-12-9b-00-7E at fd00:7::23, 12:34:56, 127.0.0.1\n"
    )
    # The machine that the tests run on has no radio.
    cell = found.cells()[0]
    row = {"node": "node0", "wifi_ssid": "Attic Net", "wifi_bssid": "a4:cf:12:9b:00:7e"}
    telemetry = pa.Table.from_pylist([row], schema=TELEMETRY.schema)
    pq.write_table(telemetry, found.cell_path(cell) / "telemetry.parquet")
    marker = json.loads((found.cell_path(cell) / "cell.json").read_bytes())
    marker["rows"]["telemetry"] = 1
    (found.cell_path(cell) / "cell.json").write_text(json.dumps(marker))
    return RunDir(folder / "run")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "archive.key"
    path.touch(mode=0o600)
    path.write_bytes(KEY)
    return path


@pytest.mark.parametrize("ending", [".tar.zst", ".tar.gz"])
def test_an_archive_contains_no_names_or_addresses(finished: RunDir, key: Path, tmp_path: Path, ending: str) -> None:
    made = export_run(finished, tmp_path / f"shelf{ending}", key_file=key, report=False)
    assert made.photos == 1
    folder = unpack(tmp_path / f"shelf{ending}", tmp_path / "there")
    everything = b""
    for path in folder.rglob("*"):
        everything += path.name.encode()
        if path.suffix == ".parquet":
            everything += json.dumps(pq.read_table(path).to_pylist()).encode()
        elif path.is_file():
            everything += path.read_bytes()
    for secret in (*SECRETS, "AnnPhone", KEY.decode()):
        assert secret.lower().encode() not in everything.lower()
    assert b"/home/ann" not in everything
    assert b"//ann@" not in everything
    assert b"127.0.0.1" in everything
    assert b"12:34:56" in everything
    rows = [row for path in folder.glob("cells/*/telemetry.parquet") for row in pq.read_table(path).to_pylist()]
    (telemetry,) = (row for row in rows if row["wifi_ssid"])
    names = Pseudonyms(KEY)
    assert telemetry["wifi_ssid"] == names.name("ssid", "Attic Net")
    assert telemetry["wifi_bssid"] == names.name("mac", "A4-CF-12-9B-00-7E")
    assert telemetry["node"] == "node0"
    note = next(e for e in RunDir(folder).events() if e["event"] == "note")
    assert telemetry["wifi_ssid"] in note["text"]
    assert names.name("ip", "192.168.7.23") in note["text"]
    assert (folder / note["photo"]).is_file()


def test_equal_runs_give_equal_archives_and_results_stay(finished: RunDir, key: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_run(finished, tmp_path / name / "shelf.tar.gz", key_file=key, report=False)
    assert (tmp_path / "a" / "shelf.tar.gz").read_bytes() == (tmp_path / "b" / "shelf.tar.gz").read_bytes()
    copy = RunDir(unpack(tmp_path / "a" / "shelf.tar.gz", tmp_path / "there"))
    for before, after in zip(sorted(finished.cells(), key=str), sorted(copy.cells(), key=str), strict=True):
        for path in finished.cell_path(before).glob("*.parquet"):
            if path.stem != "telemetry":
                assert pq.read_table(copy.cell_path(after) / path.name).equals(pq.read_table(path))
    done = subprocess.run(["sha256sum", "--quiet", "-c", CHECKSUMS], cwd=copy.path, check=False)
    assert done.returncode == 0


@pytest.mark.slow
def test_report_and_compare_work_from_the_archive_alone(
    finished: RunDir, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "shelf.tar.zst"
    made = run_in_process("testbed", "export", finished.path, "-o", archive, "--key", key)
    assert made.returncode == 0, made.stderr
    assert "look at them before you publish" in made.stdout
    assert run_in_process("testbed", "export", finished.path, "-o", archive, "--key", key).returncode == 75
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    reported = run_in_process("testbed", "report", archive, "--resamples", "100")
    assert reported.returncode == 0, reported.stderr
    page = (elsewhere / "shelf" / "report.html").read_text()
    assert "Operators' notes" in page or "Operators&#39; notes" in page
    assert "anns-laptop" not in page
    compared = run_in_process("testbed", "compare", archive, elsewhere / "shelf", "--resamples", "100")
    assert compared.returncode == 0, compared.stderr
    assert "no differences" in compared.stdout


def _archive(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """With a link where the content is text."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("run/../../evil", b"x")],
        [("/etc/evil", b"x")],
        [("run/manifest.json", "/etc/passwd")],
        [("evil", b"x")],
        [("run/a", b"x"), ("run/a", b"y")],
        [("run/manifest.json", b"{}"), ("run/SHA256SUMS", b"")],
        [("run/" + "d/" * 300 + "x", b"x")],
    ],
)
def test_files_that_are_not_archives_leave_nothing_behind(
    tmp_path: Path, members: list[tuple[str, bytes | str]]
) -> None:
    archive = _archive(tmp_path / "x.tar.gz", members)
    with pytest.raises(ArchiveError):
        unpack(archive, tmp_path / "out" / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar.gz"}


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("before", [b"", tarfile.DIRTYPE])
def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path, ending: str, kind: bytes, before: bytes) -> None:
    def header(kind: bytes, size: int) -> bytes:
        info = tarfile.TarInfo("run/x")
        info.type, info.size = kind, size
        return info.tobuf(tarfile.USTAR_FORMAT)

    archive = tmp_path / f"x{ending}"
    with open_compressed(archive, "wb") as file:
        # A folder has no content, whatever size its header states, which must not raise the limit for the next header.
        file.write((header(before, 1 << 30) if before else b"") + header(kind, 64 << 20))
        for _ in range(64):
            file.write(bytes(1 << 20))
        file.write(header(tarfile.REGTYPE, 0) + bytes(1024))
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=r"header of more than|unpacks to more than"):
            unpack(archive, tmp_path / "run")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("run/manifest.json")
    info.pax_headers = {"GNU.sparse.size": str(1 << 20), "GNU.sparse.map": "0,1"}
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(ArchiveError, match="not a plain file"):
        unpack(tmp_path / "x.tar.gz", tmp_path / "run")


def test_limits_and_damage(finished: RunDir, key: Path, tmp_path: Path) -> None:
    archive = tmp_path / "shelf.tar.zst"
    export_run(finished, archive, key_file=key, report=False)
    with pytest.raises(ArchiveError, match="more than"):
        unpack(archive, tmp_path / "a", max_bytes=1000)
    with pytest.raises(ArchiveError, match="more than"):
        unpack(archive, tmp_path / "a", max_files=3)
    data = archive.read_bytes()
    (tmp_path / "cut.tar.zst").write_bytes(data[: len(data) // 2])
    (tmp_path / "odd.tar.zst").write_bytes(b"no archive")
    for name in ("cut", "odd"):
        with pytest.raises(ArchiveError):
            unpack(tmp_path / f"{name}.tar.zst", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ArchiveError, match="must end in"):
        export_run(finished, tmp_path / "shelf.zip", key_file=key)
    key_for_all = tmp_path / "open.key"
    key_for_all.write_bytes(KEY)
    key_for_all.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        export_run(finished, tmp_path / "b.tar.gz", key_file=key_for_all)


def test_the_dictionary_describes_every_column() -> None:
    tables = {t.name: t for t in dictionary()}
    assert {*tables} == {t.name for t in ALL_TABLES}
    units = {c.name: c.unit for t in tables.values() for c in t.columns}
    assert units["round_trip_ns"] == "ns"
    assert units["wifi_rssi_dbm"] == "dBm"
    assert units["experts"] == ""
    assert all(c.meaning for t in tables.values() for c in t.columns)
    markdown = dictionary_markdown()
    for table in tables.values():
        assert f"## `{table.name}`" in markdown
        assert all(f"| `{column.name}` | {column.type} |" in markdown for column in table.columns)


@given(st.binary(min_size=16, max_size=64), st.ip_addresses(), st.text("0123456789abcdef", min_size=12, max_size=12))
def test_addresses_never_survive_and_names_are_stable(key: bytes, ip: object, digits: str) -> None:
    mac = ":".join(digits[i : i + 2] for i in range(0, 12, 2))
    names = Pseudonyms(key)
    text = names.text(f"from {ip} ({mac.upper()}) to [{ip}]")
    assert mac not in text.lower()
    assert Pseudonyms(key).text(f"from {ip} ({mac.upper()}) to [{ip}]") == text
    assert names.name("mac", mac) == names.name("mac", mac.upper().replace(":", "-"))
    address = str(ip)
    if not address.startswith("127.") and address not in ("::", "::1", "0.0.0.0"):  # noqa: S104
        assert address not in text
    assert names.text(text) == text
