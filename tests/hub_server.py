"""A hub on loopback: the part of the Hugging Face hub's HTTP that its library uses to download models."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server offers, and what it was asked.

    Attributes:
        models: folder of each model, by hub id; all have one commit, which is called `main` and `v1`.
        token: token that the server accepts; without one, callers see public models only.
        private, gated: hub ids for callers with the token only, and for none.
        base_models: what a model was made from, as its card says.
        break_at: bytes after which the connection breaks, once for each file that is longer.
        status: answer everything with this status; 0 for normal answers.
        requests: method, path and Range header of each request.
    """

    models: dict[str, Path] = field(default_factory=dict)
    token: str = "hf_right"
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    base_models: dict[str, str] = field(default_factory=dict)
    break_at: int | None = None
    status: int = 0
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def files(self, model: str) -> dict[str, Path]:
        """The files of a model by their path in the repository."""
        folder = self.models[model]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def downloaded(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve a hub; yields its URL."""
    broken: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Tests read `hub.requests` instead."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append((self.command, path, self.headers["Range"]))
            parts = path.split("/")
            api = parts[:2] == ["api", "models"]
            model, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            if hub.status:
                self.refuse(hub.status)
            elif (authorisation := self.headers["Authorization"]) and authorisation != f"Bearer {hub.token}":
                self.refuse(401, message="Invalid credentials in Authorization header")
            elif model not in hub.models or (model in hub.private and not authorisation):
                # As the hub does: callers without a token don't learn whether a model exists.
                self.refuse(404 if authorisation else 401, code="RepoNotFound")
            elif len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
                self.refuse(404, code="RevisionNotFound")
            elif api and "tree" in rest[:1]:
                self.send_json([{"type": "file", "path": n, **_facts(p)} for n, p in hub.files(model).items()])
            elif api:
                self.send_json(
                    {
                        "id": model,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": n, **_facts(p)} for n, p in hub.files(model).items()],
                        "cardData": {"base_model": hub.base_models.get(model)},
                    }
                )
            elif model in hub.gated:
                self.refuse(403, code="GatedRepo")
            elif path_of := hub.files(model).get("/".join(rest[2:])):
                self.send_content(path_of)
            else:
                self.refuse(404, code="EntryNotFound")

        def refuse(self, status: int, *, code: str = "", message: str = "") -> None:
            self.send_response(status)
            for name, value in (("X-Error-Code", code), ("X-Error-Message", message), ("Content-Length", "0")):
                if value:
                    self.send_header(name, value)
            self.end_headers()

        def send_json(self, document: Any) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_content(self, path: Path) -> None:
            data, tag = path.read_bytes(), hashlib.sha256(path.read_bytes()).hexdigest()
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if self.headers["Range"] else 0
            self.send_response(206 if first else 200)
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Content-Length", str(len(data) - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.break_at is not None and len(data) > hub.break_at and path.name not in broken:
                broken.add(path.name)
                self.wfile.write(data[first : hub.break_at])
                self.close_connection = True
                return
            self.wfile.write(data[first:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the library to a hub, with a cache in `folder` and without a login.

    Its settings are what HF_ENDPOINT and HF_HOME set before it is imported.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-login"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"size": path.stat().st_size, "oid": digest[:40], "blobId": digest[:40]}
