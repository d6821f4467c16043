"""Hugging Face's hub on loopback, as far as fetching a model needs it: what is asked for is really downloaded."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves folders as repositories under their names.

    Args:
        repositories: folders by "owner/name".
        gated: whether files are for those only who accepted some terms.
    """

    def __init__(self, repositories: Mapping[str, Path], *, gated: bool = False) -> None:
        hub = self
        self.repositories = repositories
        self.fetched: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                parts = urlsplit(self.path).path.strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    return self.describe("/".join(parts[2:4]), parts[4:])
                name, file = "/".join(parts[:2]), "/".join(parts[4:])
                path = hub.repositories[name] / file if name in hub.repositories and parts[2:3] == ["resolve"] else None
                if path is None or not path.is_file():
                    return self.send(404, b"", {"X-Error-Code": "RepoNotFound" if path is None else "EntryNotFound"})
                if gated:
                    return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
                content = path.read_bytes()
                if body:
                    hub.fetched.append(file)
                self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, body=body)

            def describe(self, name: str, rest: list[str]) -> None:
                if name not in hub.repositories:
                    return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                folder = hub.repositories[name]
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                sizes = [(str(p.relative_to(folder)), p.stat().st_size) for p in files]
                if rest[:1] == ["tree"]:
                    tree = [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in sizes]
                    return self.send(200, json.dumps(tree).encode(), {})
                siblings = [{"rfilename": path, "size": size} for path, size in sizes]
                card = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
                self.send(200, json.dumps(card).encode(), {})

            def send(self, status: int, content: bytes, headers: Mapping[str, str], *, body: bool = True) -> None:
                self.send_response(status)
                for key, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
