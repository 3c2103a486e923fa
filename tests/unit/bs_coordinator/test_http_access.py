"""Which requests the HTTP interface lets in: by host, type of content and origin."""

import gzip
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from bs_coordinator.config import ServeConfig
from bs_coordinator.errors import ServeError
from bs_coordinator.http.access import ApiKey, allowed_hosts, read_keys
from bs_coordinator.http.openai_api import http_app
from bs_coordinator.http.openai_schema import Chat, Completion
from bs_coordinator.http.request_json import parse_request
from bs_coordinator.http.request_log import request_log
from common.config import ConfigError
from common.errors import KeyFileError

NONE: Any = None


def _client(host: str = "127.0.0.1", *, key: str | None = None, origin: str = "") -> TestClient:
    keys = [ApiKey("default", key)] if key else []
    hosts = allowed_hosts(host, keyed=bool(keys))
    app = http_app(NONE, NONE, model="m", keys=keys, stall_s=1, hosts=hosts, origin=origin)
    return TestClient(app, base_url="http://127.0.0.1")


@pytest.mark.parametrize("name", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080"])
def test_names_of_this_machine_are_answered_on_loopback(name: str) -> None:
    assert _client().get("/v1/models", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize("name", ["attacker.example", "127.0.0.1.attacker.example", "localhost.example:8080", "", "["])
def test_other_names_are_refused_on_loopback_without_a_key(name: str) -> None:
    refused = _client().get("/v1/models", headers={"Host": name})
    assert (refused.status_code, refused.text) == (400, "Invalid host header")
    assert _client(key="k").get("/v1/models", headers={"Host": name or "x", "Authorization": "Bearer k"}).is_success


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_only_json_is_read(path: str, kind: str | None) -> None:
    class Templated:
        has_chat_template = True

    app = http_app(NONE, Templated(), model="m", stall_s=1)  # type: ignore[arg-type]
    client = TestClient(app)
    refused = client.post(path, content=b"{}", headers={} if kind is None else {"Content-Type": kind})
    assert refused.status_code == 415
    assert "Content-Type: application/json" in refused.json()["error"]["message"]
    assert (
        client.post(path, content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 400
    )


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200), ("http://127.0.0.1", 200), ("https://[::1]:5173", 200),
        ("https://chat.example", 200), ("https://attacker.example", 400), ("http://localhost.example", 400),
        ("null", 400),
    ],
)  # fmt: skip
def test_web_pages_may_call_from_this_machine_and_the_named_origin(origin: str, status: int) -> None:
    client = _client(origin="https://chat.example", key="k")
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    assert client.options("/v1/chat/completions", headers=asked).status_code == status
    # An error has the header as well, so that the page can read why.
    answered = client.get("/v1/models", headers={"Origin": origin})
    assert (answered.status_code, "access-control-allow-origin" in answered.headers) == (401, status == 200)


def test_pages_of_another_network_are_let_in_by_their_origin_alone() -> None:
    client = _client(origin="https://chat.example")
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    let_in = client.options("/v1/chat/completions", headers={"Origin": "https://chat.example", **asked})
    assert (let_in.status_code, let_in.headers["access-control-allow-private-network"]) == (200, "true")
    refused = client.options("/v1/chat/completions", headers={"Origin": "https://attacker.example", **asked})
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP, br", "zstd"])
def test_compressed_bodies_are_refused_as_such(encoding: str) -> None:
    client = TestClient(http_app(NONE, NONE, model="m", stall_s=1))
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    refused = client.post("/v1/completions", content=gzip.compress(b"{}"), headers=headers)
    assert (refused.status_code, encoding.lower() in refused.json()["error"]["message"]) == (415, True)
    headers["Content-Encoding"] = "identity"
    assert client.post("/v1/completions", content=b"{}", headers=headers).status_code == 400


def test_the_model_is_shown_under_all_its_names() -> None:
    client = TestClient(http_app(NONE, NONE, model="maker/model", model_aliases=["gpt"], stall_s=1))
    for name in ("maker/model", "maker%2Fmodel", "gpt", "wdmoe"):
        assert client.get(f"/v1/models/{name}").json()["id"] == "maker/model"
    assert client.get("/v1/models/").json()["data"][0]["id"] == "maker/model"
    assert client.get("/v1/models/maker").status_code == 404
    assert client.head("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("host", "", "an empty text is not a host"),
        ("host", "http://0.0.0.0", "a URL is not a host"),
        ("host", "[::1]", "without brackets"),
        ("host", "127.0.0.1:8080", "without a port"),
        ("host", "127.1", "not an IPv4 address"),
        ("host", "kitchen..local", "two dots"),
        ("cors_origin", "https://chat.example/", "not the origin"),
        ("cors_origin", "*", "not the origin"),
        ("cors_origin", "chat.example", "not the origin"),
        ("cors_origin", "https://pi:hush@chat.example", "not the origin"),
        ("cors_origin", "https://a.example,https://b.example", "not the origin"),
        ("cors_origin", "http://chat.example:８０", "not the origin"),
        ("cors_origin", "http://chat.example:70000", "not the origin"),
        ("cors_origin", "https://chat.example:443", "another way: https://chat.example$"),
        ("cors_origin", "HTTPS://Küche.example", "another way: https://xn--kche-0ra.example$"),
    ],
)
def test_where_the_server_listens_and_for_whom_is_checked(option: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        ServeConfig(**{option: value})  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"--{option.replace('_', '-')}: ")
    assert "hush" not in str(refused.value)


def test_origins_as_browsers_write_them_are_taken() -> None:
    for origin in ("http://192.168.1.10:3000", "http://[fd00::7]:3000", "chrome-extension://abc", "app://obsidian.md"):
        assert ServeConfig(cors_origin=origin).cors_origin == origin


def test_the_openapi_document_knows_every_option(tmp_path: Path) -> None:
    client = _client(key="k")
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert document["security"] == [{"key": []}]
    for path, kind in (("/v1/completions", Completion), ("/v1/chat/completions", Chat)):
        name = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        schema = schemas[name.rpartition("/")[2]]
        assert schema["additionalProperties"] is False
        known = schema["properties"]
        assert {"model", "n", "stop", "stream_options", "user", "tools"} <= known.keys()
        required = {"prompt": "x"} if kind is Completion else {"messages": [{"role": "user", "content": "x"}]}
        assert set(required) == set(schema["required"])
        # What the document allows is accepted, each option alone; anything else is refused.
        for option, values in known.items():
            for value in values.get("enum", [values["default"]] if "default" in values else []):
                parse_request(json.dumps({**required, option: value}).encode(), kind)
        with pytest.raises(ValueError, match="surprise"):
            parse_request(json.dumps({**required, "surprise": 1}).encode(), kind)
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)):
        assert reference.removeprefix("#/components/schemas/") in schemas


def test_named_keys_are_read_with_their_limits(tmp_path: Path) -> None:
    def read(text: str, **more: Any) -> list[ApiKey]:
        file = tmp_path / "keys"
        file.write_text(text)
        file.chmod(0o600)
        return read_keys(ServeConfig(api_keys_file=file, **more))

    single = tmp_path / "key"
    single.write_text("open sesame\n")
    single.chmod(0o600)
    keys = read("# callers\nada a-key\n\nbob b-key 2\n", host="192.0.2.1", api_key_file=single)
    assert keys == [ApiKey("default", "open sesame"), ApiKey("ada", "a-key"), ApiKey("bob", "b-key", 2)]
    for bad in ("", "ada", "ada k 0", "ada k two", "ada k 1 2", "ada schlüssel", "ada k\nada l", "ada k\nbob k"):
        with pytest.raises(KeyFileError, match="keys"):
            read(bad)
    (tmp_path / "keys").chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_keys(ServeConfig(api_keys_file=tmp_path / "keys"))
    with pytest.raises(ServeError, match="--api-key-file"):
        read_keys(ServeConfig(host="192.0.2.1"))


def test_the_request_log_grows_and_survives_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "requests.jsonl"
    for id in ("a", "b"):
        with request_log(file) as write:
            write({"id": id})
    assert file.read_text() == '{"id":"a"}\n{"id":"b"}\n'
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ServeError, match="--request-log"), request_log(tmp_path / "no" / "folder"):
        pass
    with request_log(Path("/dev/full")) as write:
        write({"id": "c"})
    assert "can't write the request log /dev/full" in caplog.text
