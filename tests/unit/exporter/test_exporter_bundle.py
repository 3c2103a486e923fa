"""Bundles through the real command: resume, repair, refusal, full disks, Ctrl-C, dying workers."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from exporter.bundle.bundle import export_bundle
from exporter.bundle.workers import processes_that_fit
from exporter.expert.presets import choose_quantisation
from tests.checkpoints import copy_checkpoint, poke
from tests.conftest import Run
from wire.errors import BundleError, SignatureError
from wire.experts import parse_selector
from wire.manifest import ExpertEntry, FileEntry, Quantisation, load_manifest
from wire.signature import load_trusted_manifest, sign

INT4 = Quantisation(scheme="int4", block=32)
JOURNAL = "export-state.jsonl"
W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"


def assert_bundle_is_whole(out: Path, source: Path, scratch: Path) -> None:
    """`out` equals an export that nothing disturbed, file for file."""
    export_bundle(source, scratch, INT4, jobs=1)
    assert load_manifest(out) == load_manifest(scratch)
    for path in (p for folder in (out, scratch) for p in folder.rglob("*") if p.is_file()):
        assert (out / path.relative_to(out if out in path.parents else scratch)).exists()
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (out, scratch)]
    assert names[0] == names[1]


def test_a_bundle_of_another_version_is_tried_even_if_it_is_up_to_date(
    mixtral: Callable[..., Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "bundle", mixtral()
    assert run("exporter", "bundle", source, out).returncode == 0
    tried: list[Path] = []

    def try_trunk(folder: Path, *_: object) -> list[str]:
        tried.append(folder)
        return ["it refuses a second turn"]

    monkeypatch.setattr("exporter.bundle.bundle.try_trunk", try_trunk)
    assert run("exporter", "bundle", source, out).returncode == 0
    assert tried == []
    manifest = out / "manifest.json"
    manifest.write_text(re.sub(r'("wdmoe": ")[^"]+', r"\g<1>0.0.1", manifest.read_text()))
    again = run("exporter", "bundle", source, out)
    assert (tried, "is up to date" in again.stdout) == ([out / "trunk"], True)
    assert "refuses a second turn" in again.stdout + again.stderr


def test_up_to_date_and_repair(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("exporter", "bundle", mixtral(), out).returncode == 0
    again = run("exporter", "bundle", mixtral(), out)
    assert again.returncode == 0
    assert "is up to date" in again.stdout
    weights = out / "experts/L01/E3.weights"
    weights.write_bytes(weights.read_bytes()[::-1])
    broken = run("exporter", "verify", out)
    assert broken.returncode == 11
    assert "E3.weights does not match its SHA-256" in broken.stderr
    repaired = run("exporter", "bundle", mixtral(), out)
    assert repaired.returncode == 0
    assert "kept 7 experts" in repaired.stdout
    assert_bundle_is_whole(out, mixtral(), tmp_path / "scratch")


def test_a_bundle_of_slices(
    mixtral: Callable[..., Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.bundle.bundle.try_trunk", lambda *_: [])
    out, options = tmp_path / "out", ("--jobs", 1, "--slices", 3)
    made = run("exporter", "bundle", mixtral(), out, *options)
    assert made.returncode == 0, made.stderr
    assert re.search(r"^slices +24 as int4 b32$", made.stdout, re.MULTILINE)
    manifest = load_manifest(out)
    assert (manifest.dims.slices, manifest.dims.units, len(manifest.experts)) == (3, 12, 24)
    whole = msgspec.structs.replace(manifest, dims=msgspec.structs.replace(manifest.dims, slices=1), experts=())
    assert manifest.model_sha256 == whole.model_sha256
    shown = run("exporter", "inspect", out).stdout
    assert "2 layers × 4 experts in 3 slices" in shown
    assert "experts L0-1:E0-3 as int4 b32" in shown

    (out / "experts/L01/E3-2of3.weights").write_bytes(b"")
    assert "2 slices match their hashes" in run("exporter", "verify", out, "--experts", "L1:E3/0-1").stdout
    assert run("exporter", "verify", out).returncode == 11
    assert "kept 23 slices" in run("exporter", "bundle", mixtral(), out, *options).stdout
    assert load_manifest(out) == manifest

    refused = run("exporter", "bundle", mixtral(), out, "--jobs", 1)
    assert (refused.returncode, "L0-1:E0-3 in 3 slices): choose another folder" in refused.stderr) == (11, True)
    refused = run("exporter", "bundle", mixtral(), tmp_path / "other", "--slices", 4)
    assert refused.returncode == 2
    assert "96 inner neurons in blocks of 32 can't be cut into 4 slices: at most 3" in refused.stderr

    nodes = [word for name in "abc" for word in ("--node", f"{name}=1G")]
    placed = run("bs_coordinator", "place", "--bundle", out, "--replicas", 1, *nodes)
    selectors = re.findall(r"--experts '([^']+)'", placed.stdout)
    held = [id for text in selectors for id in parse_selector(text, layers=2, experts=4, slices=3)]
    assert sorted(held) == [entry.id for entry in manifest.experts]
    assert len(selectors) == 3
    assert "/" in placed.stdout


def test_what_is_new_beside_the_weights_is_copied_without_the_experts(
    mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    source, out = copy_checkpoint(mixtral(), tmp_path / "checkpoint"), tmp_path / "out"
    export_bundle(source, out, INT4, jobs=1)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    experts = {path: path.stat().st_mtime_ns for path in out.glob("experts/*/*")}
    for template in ("one", "another"):
        (source / "chat_template.jinja").write_text(template)
        added = run("exporter", "bundle", source, out)
        assert added.returncode == 0, added.stderr
        assert "kept 8 experts" in added.stdout
        assert "up to date" not in added.stdout
        assert (out / "trunk/chat_template.jinja").read_text() == template
    assert (out / "trunk/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in out.glob("experts/*/*")} == experts
    assert "up to date" in run("exporter", "bundle", source, out).stdout
    assert run("exporter", "verify", out).returncode == 0


@pytest.fixture
def signed(mixtral: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A bundle with a draft model (of any bytes) and a signature, and the public key."""
    out, private, public = tmp_path / "out", tmp_path / "bundle.key", tmp_path / "bundle.pub"
    manifest = export_bundle(mixtral(), out, INT4, jobs=1).manifest
    (out / "draft").mkdir()
    (out / "draft/draft.json").write_bytes(b"a draft")
    digest = hashlib.sha256(b"a draft").hexdigest()
    draft = (FileEntry(path="draft/draft.json", bytes=7, sha256=digest),)
    raw = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, draft=draft)), indent=1)
    (out / "manifest.json").write_bytes(raw)
    key = Ed25519PrivateKey.generate()
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    sign(raw, out, private)
    return out, public


def test_a_repair_leaves_draft_and_signature_as_they_are(
    signed: tuple[Path, Path], mixtral: Callable[..., Path], run: Run
) -> None:
    out, public = signed
    before = load_trusted_manifest(out, public)
    (out / "experts/L01/E3.weights").write_bytes(b"")
    repaired = run("exporter", "bundle", mixtral(), out)
    assert "kept 7 experts" in repaired.stdout
    assert "manifest.sig" not in repaired.stdout
    assert load_trusted_manifest(out, public) == before
    assert not (out / "manifest-before.json").exists()


def test_an_interrupted_repair_does_not_forget_the_draft(
    signed: tuple[Path, Path], mixtral: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, public = signed
    before = load_trusted_manifest(out, public)
    (out / "experts/L01/E3.weights").write_bytes(b"")

    def interrupted(*_args: object) -> Iterator[ExpertEntry]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("exporter.bundle.bundle.export_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(mixtral(), out, INT4, jobs=1)
    assert not (out / "manifest.json").exists()
    result = export_bundle(mixtral(), out, INT4, jobs=1)
    assert (result.kept, result.lost) == (7, ())
    assert load_trusted_manifest(out, public) == before
    assert sorted(path.name for path in out.iterdir()) == ["draft", "experts", "manifest.json", "manifest.sig", "trunk"]


def test_a_damaged_draft_is_left_out_and_a_changed_manifest_unsigned(
    signed: tuple[Path, Path], mixtral: Callable[..., Path], run: Run
) -> None:
    out, public = signed
    (out / "draft/draft.json").write_bytes(b"another")
    result = run("exporter", "bundle", mixtral(), out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the draft model in") == 1
    assert result.stdout.count("manifest.sig, which does not fit the new manifest") == 1
    assert load_manifest(out).draft == ()
    assert not (out / "manifest.sig").exists()
    with pytest.raises(SignatureError, match="is not signed"):
        load_trusted_manifest(out, public)
    assert "up to date" in run("exporter", "bundle", mixtral(), out).stdout


def test_verify_and_inspect(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    assert run("exporter", "bundle", mixtral(), out, "--layers", "1", "--experts", "0,2").returncode == 0
    verified = run("exporter", "verify", out)
    assert verified.returncode == 0, verified.stderr
    assert "2 experts match" in verified.stdout
    absent = run("exporter", "verify", out, "--experts", "L0:E*")
    assert absent.returncode == 11
    assert "the bundle has no expert L00:E0" in absent.stderr
    inspected = run("exporter", "inspect", out)
    assert inspected.returncode == 0
    assert "L1:E0,2" in inspected.stdout
    assert re.search(
        r"^output error +median 0\.\d+, largest 0\.\d+ \(L01:E\d\), against fp32$", inspected.stdout, re.MULTILINE
    )


def test_refusals(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    source, out = copy_checkpoint(mixtral(), tmp_path / "checkpoint"), tmp_path / "out"
    for inside in (source, source / "bundle"):
        result = run("exporter", "bundle", source, inside)
        assert result.returncode == 12
        assert "lies inside the checkpoint" in result.stderr
    assert run("exporter", "bundle", source, out).returncode == 0
    before = (out / "manifest.json").read_bytes()
    other = run("exporter", "bundle", source, out, "--quant", "fp16")
    assert other.returncode == 11
    assert "already holds another bundle (checkpoint, int4 b32, L0-1:E0-3)" in other.stderr
    poke(source / "model.safetensors", W1, b"\x00\x3f")
    retrained = run("exporter", "bundle", source, out)
    assert retrained.returncode == 11
    assert "made from other weights" in retrained.stderr
    assert (out / "manifest.json").read_bytes() == before
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    foreign = run("exporter", "bundle", source, full)
    assert foreign.returncode == 11
    assert "not empty and not a bundle" in foreign.stderr
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]
    for result in (other, retrained, foreign):
        assert result.stderr.count("\n") == 1


def test_a_path_that_is_not_utf8(random_bundle: Path, mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    """Onnxruntime and safetensors can't open such a path."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    refused = run("exporter", "bundle", mixtral(), strange, "--quant", "fp32")
    assert refused.returncode == BundleError.exit_code
    assert "the path of a bundle must be UTF-8, or its models can't be opened: rename it" in refused.stderr
    assert not strange.exists()
    copy_checkpoint(random_bundle, strange)
    for package, *arguments in (
        ("exporter", "verify", strange),
        ("bs_coordinator", "generate", "--bundle", strange, "--prompt", "a"),
        ("edge_node", "--bundle", strange, "--broker", "mqtt://127.0.0.1:1", "--id", "n", "--experts", "L*:E*"),
    ):
        refused = run(package, *arguments)
        assert refused.returncode == BundleError.exit_code, refused.stderr
        assert refused.stderr.count("must be UTF-8") == 1, refused.stderr


def test_unfinished_export_of_another_kind(mixtral: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_bundle(mixtral(), out, INT4, jobs=1)
    (out / "manifest.json").rename(out / "gone")
    assert not (out / JOURNAL).exists()
    (out / JOURNAL).write_text("not a journal\n")
    export_bundle(mixtral(), out, INT4, jobs=1)
    assert load_manifest(out).quantisation == INT4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "int4 b32 (the default"),
        (("--device", "pi4"), "int8-dynamic for pi4: "),
        (("--device", "pi5"), "int4 b32 for pi5: "),
        (("--device", "pi4", "--quant", "int8", "--block", "64"), "int8 b64"),
        (("--w2-bits", "8"), "int4 b32 w2-int8"),
    ],
)
def test_presets_report_their_choice(
    options: tuple[str, ...], said: str, mixtral: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    result = run("exporter", "bundle", mixtral(), tmp_path / "out", "--layers", "0", *options)
    assert result.returncode == 0, result.stderr
    assert f"quantisation: {said}" in result.stdout


def test_options_that_do_not_go_together(mixtral: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    with pytest.raises(ValueError, match="don't apply to --quant fp16"):
        choose_quantisation(None, "fp16", 32, False)
    with pytest.raises(ValueError, match="--w2-bits is for --quant int4, not int8-dynamic"):
        choose_quantisation("pi4", None, None, False, 8)
    with pytest.raises(ValueError, match=r"--w2-bits 8 does not suit pi4: its cores lack .* use --quant int8-dynamic"):
        choose_quantisation("pi4", "int4", None, False, 8)
    for options in (("--quant", "fp32", "--symmetric"), ("--quant", "int8", "--w2-bits", "8"), ("--layers", "9"),
                    ("--experts", "x")):  # fmt: skip
        result = run("exporter", "bundle", mixtral(), tmp_path / "out", *options)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("available_mb", "processes"), [(0, 1), (400, 1), (1100, 2), (1300, 3), (100_000, 4)], ids="{} MB".format
)
def test_no_more_processes_than_fit_into_memory(available_mb: int, processes: int) -> None:
    """Files of 113 MB, as of Mixtral-8x7B's experts in int4: four processes took 370 MiB each."""
    assert processes_that_fit(4, 113 * 10**6, available_mb << 20) == processes


def test_a_machine_short_of_memory_still_exports(
    mixtral: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("exporter.bundle.bundle.available_bytes", lambda: 0)
    assert len(export_bundle(mixtral(), tmp_path / "bundle", INT4, jobs=4).manifest.experts) == 8
    assert "exporting with 1 of 4 processes" in caplog.text
