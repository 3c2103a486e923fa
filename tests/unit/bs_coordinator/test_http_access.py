"""Which requests the HTTP interface lets in: by host, type of content and origin."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from bs_coordinator.http.access import allowed_hosts
from bs_coordinator.http.openai_api import http_app

NONE: Any = None


def _client(host: str = "127.0.0.1", *, key: str | None = None, origin: str = "") -> TestClient:
    app = http_app(
        NONE, NONE, model="m", api_key=key, stall_s=1, hosts=allowed_hosts(host, key), origin=origin
    )  # fmt: skip
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

    app = http_app(NONE, Templated(), model="m", api_key=None, stall_s=1)  # type: ignore[arg-type]
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
