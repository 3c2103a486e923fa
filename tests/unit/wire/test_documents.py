"""Selectors, names, statuses, manifests and broker URLs: what is valid comes back, the rest is refused."""

import base64
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import StorageError
from common.files import atomic_write
from wire import status
from wire.broker_url import Access, parse_broker_url, read_secret
from wire.errors import BrokerAuthError, BundleError, FrameError
from wire.experts import ExpertId, UnitId, check_selector, format_selector, parse_selector, unit_name
from wire.manifest import ExpertGraph, FileEntry, Manifest, decode_manifest, load_manifest, mixtral_architecture
from wire.probe import PROBE_VALUES, decode_probe_output, encode_probe_output, probe_error, probe_input
from wire.status import NodeStatus
from wire.topics import Topics, check_name

expert_sets = st.sets(st.builds(ExpertId, st.integers(0, 31), st.integers(0, 7)), min_size=1)


@given(expert_sets)
def test_selectors_are_read_back(ids: set[ExpertId]) -> None:
    assert set(parse_selector(format_selector(ids), layers=32, experts=8)) == ids


def test_selector_grammar() -> None:
    assert parse_selector("L*:E3", layers=2, experts=8) == (ExpertId(0, 3), ExpertId(1, 3))
    assert len(parse_selector("L0-1:E0,2;L3:E*", layers=4, experts=4)) == 8
    assert format_selector(parse_selector("L*:E3", layers=30, experts=8)) == "L0-29:E3"


units = st.sets(st.tuples(st.integers(0, 7), st.integers(0, 23)).map(lambda t: UnitId(*t)), min_size=1)


@given(units)
def test_selectors_of_slices_are_read_back(ids: set[UnitId]) -> None:
    assert set(parse_selector(format_selector(ids, 3), layers=8, experts=8, slices=3)) == ids


def test_slices_in_selectors() -> None:
    every = parse_selector("L*:E*", layers=30, experts=8, slices=4)
    assert len(every) == 960
    assert format_selector(every, 4) == "L0-29:E0-7"
    assert parse_selector("L*:E3/0,2-3 L1:E0", layers=2, experts=4, slices=4) == (
        *(UnitId(0, unit) for unit in (12, 14, 15)), *(UnitId(1, unit) for unit in (0, 1, 2, 3, 12, 14, 15))
    )  # fmt: skip
    assert format_selector(parse_selector("L*:E*/1", layers=30, experts=8, slices=4), 4) == "L0-29:E0-7/1"
    assert format_selector(parse_selector("L*:E0-3 L*:E4-7/1", layers=2, experts=8, slices=2), 2) == (
        "L0-1:E0-3 L0-1:E4-7/1"
    )
    assert unit_name(UnitId(4, 13), 4) == "L04:E3/1"
    for text in ("L*:E3/4", "L*:E3/", "L*:E3/1-0", "L*:E3/*/*"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_selector(text, layers=30, experts=8, slices=4)
    with pytest.raises(ValueError, match="names a slice, but the experts are whole"):
        parse_selector("L*:E3/0", layers=30, experts=8)
    with pytest.raises(ValueError, match="repeats experts too often"):
        check_selector(" ".join(["L*:E*/0-2"] * 6), layers=30, experts=8, slices=4)


@pytest.mark.parametrize("text", ["", "E3", "L*", "L*:E8", "L30:E0", "L3-1:E0", "L*:E", "L-1:E0", "L1,,2:E0", "l1:e1"])
def test_bad_selectors_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_selector(text, layers=30, experts=8)


@given(st.text("LE*:,-;0123/ ", max_size=12))
def test_a_selector_is_checked_as_it_is_expanded(text: str) -> None:
    outcomes: list[object] = []
    for read in (parse_selector, check_selector):
        try:
            read(text, layers=3, experts=4, slices=2)
            outcomes.append(None)
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_topics_name_their_node(node: str) -> None:
    topics = Topics("lab")
    assert check_name("node", node) == node
    assert topics.node_of_status(topics.status(node)) == node
    assert topics.node_of_result(topics.results(node)) == node
    assert Topics("other").node_of_result(topics.results(node)) is None
    assert topics.node_of_status(topics.work(node)) is None


@pytest.mark.parametrize("name", ["@bs", "-a", "a b", "x" * 65, "é"])
def test_topics_with_invalid_node_names_belong_to_no_node(name: str) -> None:
    topics = Topics("lab")
    assert topics.node_of_status(topics.status(name)) is None
    assert topics.node_of_result(topics.results(name)) is None
    assert topics.node_of_telemetry(topics.telemetry(name)) is None


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "-a", "x" * 65, "a\n"])
def test_names_that_break_topics_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not valid"):
        check_name("node", name)


def _status(**changes: object) -> bytes:
    fields: dict[str, object] = {
        "schema": 1, "node": "n1", "boot_id": "b", "state": "online", "since_unix_ms": 1,
        "holding": {
            "experts": "L*:E0", "model_sha256": "0", "quantisation": "int4", "resident_bytes": 1,
            "dims": {"hidden": 4, "intermediate": 8, "layers": 2, "experts": 2, "top_k": 2, "vocab": 9,
                     "max_positions": 16},
        },
    }  # fmt: skip
    return json.dumps({**fields, **changes}).encode()


_UPLINK = {"endpoint": "10.0.0.2:9", "min_rtt_us": 900, "delivery_bytes_per_s": 10**6, "app_limited": True}


def _holding(selector: str, **dims: int) -> bytes:
    holding = json.loads(_status())["holding"]
    return _status(holding={**holding, "experts": selector, "dims": {**holding["dims"], **dims}})


def test_status_is_read() -> None:
    read = status.decode_status(_status(from_the_future=1), "n1")
    assert read.unit_ids() == (ExpertId(0, 0), ExpertId(1, 0))
    assert status.decode_status(_status(uplink=_UPLINK), "n1").uplink is not None
    assert len(status.decode_status(_holding("L*:E*", layers=256, experts=256), "n1").unit_ids()) == 1 << 16
    assert status.decode_status(status.encode_status(read), "n1") == read
    cut = status.decode_status(_holding("L*:E1/0", slices=2), "n1")
    assert cut.unit_ids() == (UnitId(0, 2), UnitId(1, 2))
    with pytest.raises(FrameError, match="256 layers of 256 experts in 2 slices: at most 65536 in all"):
        status.decode_status(_holding("L*:E*", layers=256, experts=256, slices=2), "n1")


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"[]", b"\xff\xfe", b"{}", _status(schema=2), _status(node="n2"), _status(state="happy"),
        _status(since_unix_ms=-1), _status(holding={}), b"[" * 100_000,
        _status(holding={**json.loads(_status())["holding"], "experts": "L9:E0"}),
        _status(since_unix_ms=10**400), _status(uplink={**_UPLINK, "min_rtt_us": 10**400}),
        _status(uplink={**_UPLINK, "delivery_bytes_per_s": 2**63}),
        _holding("L*:E*", layers=5000, experts=5000), _holding("L*:E*", layers=2**31),
        _holding("L*:E* " * 10_000, layers=256, experts=256),
        _holding(f"L{'0-255,' * 10_000}0:E*", layers=256, experts=256),
    ],
)  # fmt: skip
def test_bad_statuses_are_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        status.decode_status(payload, "n1")


@given(st.binary(max_size=200))
def test_status_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        status.decode_status(payload, "n1")


def test_offline_status_holds_nothing() -> None:
    offline = NodeStatus(schema=1, node="n", boot_id="b", state="offline", since_unix_ms=0)
    assert offline.unit_ids() == ()


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "", "a/../../b", "a\\b"])
def test_manifest_paths_stay_in_the_bundle(path: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"path": path, "bytes": 1, "sha256": "0" * 64}, FileEntry)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}', "null"])
def test_bad_manifests_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        load_manifest(tmp_path)


SCHEMA_1 = (Path(__file__).parent / "manifest-schema-1.json").read_bytes()


def test_manifests_of_schema_1_are_read_as_mixtral() -> None:
    manifest = decode_manifest(SCHEMA_1, Path("bundle"))
    assert manifest.architecture == mixtral_architecture(2)
    assert manifest.model_sha256 == "6067205a380594a8c5e2723d6807b4f1d85b1039415b17758869dd634667d132"
    written = msgspec.json.encode(manifest)
    assert json.loads(written) == json.loads(SCHEMA_1) | {
        "schema": 2,
        "draft": [],
        "architecture": {
            "family": "mixtral",
            "layers": [0, 1],
            "expert": {"activation": "silu", "biases": False, "alpha": None, "limit": None},
            "routing": {"score": "softmax", "renormalised": True, "factor": 1.0},
        },
    }
    assert decode_manifest(written, Path("bundle")) == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "has schema 3, this version reads 1 and 2: make the bundle again with 'wdmoe-export bundle'"),
        ({"schema": 1}, "schema 1 has no `architecture`"),
        ({"layers": [0]}, "2 layers with experts, 1 are named"),
        ({"layers": [3, 1]}, "layers are not ascending"),
        ({"expert": {"activation": "relu"}}, "Invalid enum value 'relu'"),
        ({"expert": {"activation": "clamped", "alpha": 1.7}}, "needs a positive alpha and a positive limit"),
        ({"expert": {"limit": 7.0}}, "activation silu has no alpha and no limit"),
    ],
)
def test_architectures_that_are_refused(changes: dict[str, object], message: str) -> None:
    document = json.loads(msgspec.json.encode(decode_manifest(SCHEMA_1, Path("bundle"))))
    document["schema"] = changes.pop("schema", 2)
    document["architecture"] |= changes
    with pytest.raises(BundleError, match=re.escape(message)):
        decode_manifest(json.dumps(document).encode(), Path("bundle"))


def test_an_architecture_with_dense_layers_and_clamped_experts_is_read_back() -> None:
    manifest = decode_manifest(SCHEMA_1, Path("bundle"))
    expert = ExpertGraph(activation="clamped", biases=True, alpha=1.702, limit=7.0)
    architecture = msgspec.structs.replace(manifest.architecture, family="gpt_oss", layers=(1, 3), expert=expert)
    changed = msgspec.structs.replace(manifest, architecture=architecture)
    assert msgspec.json.decode(msgspec.json.encode(changed), type=Manifest) == changed
    assert str(expert) == "clamped (alpha 1.702, limit 7) with biases"


def test_a_folder_without_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="wdmoe-export bundle"):
        load_manifest(tmp_path)


def test_probe_input_is_the_same_everywhere() -> None:
    """Its values follow from SplitMix64's published outputs for seed 0 (Steele et al. 2014)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [((z >> 40) / 2**24 - 0.5) * 12**0.5 for z in published]
    x = probe_input(4096, rows=2)
    np.testing.assert_allclose(x[0, :3], expected, rtol=1e-6)
    assert x.shape == (2, 4096)
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.02


def test_probe_outputs_are_read_back() -> None:
    y = probe_input(16)[0]
    np.testing.assert_allclose(decode_probe_output(encode_probe_output(y), 16), y, rtol=2**-10)
    for bad in ("!", "AAAA"):
        with pytest.raises(BundleError):
            decode_probe_output(bad, 16)


@pytest.mark.parametrize("hidden", [64, 256, 576, 2048, 7168])
def test_folded_probe_outputs_keep_sizes_and_distances(hidden: int) -> None:
    y = probe_input(hidden, rows=3)[2]
    y[5] = 300.0  # one output that is much larger than the others
    stored = encode_probe_output(y)
    kept = decode_probe_output(stored, hidden)
    assert len(kept) == min(hidden, PROBE_VALUES)
    assert np.linalg.norm(kept) == pytest.approx(np.linalg.norm(y), rel=0.15)
    assert probe_error(stored, y) < 1e-3
    for wrong in (np.arange(hidden) == hidden - 1, np.arange(hidden) % 7 == 0, np.ones(hidden, bool)):
        change = 10 * wrong.astype(np.float32)
        expected = float(np.linalg.norm(change) / np.linalg.norm(y))
        assert probe_error(stored, y + change) == pytest.approx(expected, rel=0.2)


def test_probe_outputs_of_schema_1_are_whole() -> None:
    y = probe_input(2048)[0]
    whole = base64.b64encode(y.astype("<f2").tobytes()).decode()
    assert len(decode_probe_output(whole, 2048)) == 2048
    assert probe_error(whole, y) < 1e-3
    assert probe_error(whole, -y) == pytest.approx(2, rel=1e-3)


def test_broker_urls() -> None:
    address = parse_broker_url("mqtts://pi%40lab@broker.local")
    assert (address.host, address.port, address.tls, address.user) == ("broker.local", 8883, True, "pi@lab")
    assert str(parse_broker_url("mqtt://[::1]:99")) == "mqtt://[::1]:99"


@pytest.mark.parametrize(
    "url", ["", "localhost", "http://h", "mqtt://", "mqtt://h:x", "mqtt://u:secret@h", "mqtt://h/path"]
)
def test_bad_broker_urls_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_broker_url(url)
    assert "secret" not in str(caught.value)


def test_secrets_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("hush\n")
    path.chmod(0o644)
    with pytest.raises(BrokerAuthError, match="chmod 600"):
        read_secret(path)
    path.chmod(0o600)
    assert read_secret(path) == "hush"
    address = parse_broker_url("mqtt://u@h", Access(path, allow_plaintext=True))
    assert "hush" not in f"{address} {address!r}"


def test_atomic_write_leaves_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with atomic_write(target) as file:
        file.write(b"one")
    with pytest.raises(RuntimeError), atomic_write(target) as file:  # noqa: PT012
        file.write(b"two")
        raise RuntimeError
    assert target.read_bytes() == b"one"
    assert list(target.parent.iterdir()) == [target]
    with pytest.raises(StorageError), atomic_write(target / "under-a-file") as file:
        file.write(b"three")
