"""As much of the hub's API as an upload needs, over real sockets; its refusals are for a test to say."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class FakeHub(ThreadingHTTPServer):
    """Keeps repositories in memory: ``repositories[name] = {"private": ..., "branches": {branch: {file: bytes}}}``.

    Attributes:
        token: The one that it knows.
        refuses: For the beginning of a path the statuses that the next requests to it get.
        asked: Method and path of each request.
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_test") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.user = token, "me"
        self.repositories: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.refuses: dict[str, list[int]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply(200, None)

    def do_GET(self) -> None:
        self.answer(b"")

    def do_PUT(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_POST = do_PUT

    def reply(self, status: int, value: Any, **headers: str) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def answer(self, body: bytes) -> None:
        hub, path = self.server, unquote(self.path).partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        for beginning, statuses in hub.refuses.items():
            if path.startswith(beginning) and statuses:
                return self.reply(statuses.pop(0), {"error": "as the test wants it"})
        if path.startswith("/blobs/"):
            hub.blobs[path.removeprefix("/blobs/")] = body
            return self.reply(200, {})
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.reply(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self.reply(200, {"type": "user", "name": hub.user})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or hub.user}/{given['name']}"
            if name.partition("/")[0] != hub.user:
                return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
            if name in hub.repositories:
                return self.reply(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            private = given.get("private") or given.get("visibility") == "private"
            hub.repositories[name] = {
                "kind": given.get("type", "model"),
                "private": bool(private),
                "branches": {"main": {}},
            }
            return self.reply(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        _, _, _, owner, repository, *rest = [*path.split("/"), "", ""][: len(path.split("/"))] + [""] * 5
        name, rest = f"{owner}/{repository}", [part for part in rest if part]
        found = hub.repositories.get(name)
        if found is None:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if not rest:
            author = {"author": owner, "tags": [], "downloads": 0, "likes": 0}
            return self.reply(200, {"id": name, "private": found["private"], "sha": "0" * 40, **author})
        what, branch = rest[0], rest[1]
        if what == "branch":
            found["branches"].setdefault(branch, {})
            return self.reply(200, {})
        if what == "preupload":
            kinds = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": one["path"],
                    "uploadMode": kinds[one["path"].endswith((".safetensors", ".parquet"))],
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        assert what == "commit", path
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                hub.messages.append(entry["value"]["summary"])
            elif entry["key"] == "lfsFile":
                blob = hub.blobs[entry["value"]["oid"]]
                assert hashlib.sha256(blob).hexdigest() == entry["value"]["oid"]
                found["branches"][branch][entry["value"]["path"]] = blob
            else:
                content = base64.b64decode(entry["value"]["content"])
                found["branches"][branch][entry["value"]["path"]] = content
        self.reply(200, {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})
