"""A stand-in for the Hugging Face Hub on this machine: one model to download, and uploads that are kept in memory."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

COMMIT = "c" * 40


class ModelHub:
    """Speaks as much of the Hub's API as downloading and uploading a model needs."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        """Files of the model `repository`, offered for download."""
        self.repository = "owner/gpt2"
        self.uploaded: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.refuse: dict[str, int] = {}
        """Answers with this status to every path that has the key in it."""
        self.refusal: dict[str, str] = {}
        """Headers of such an answer."""
        self._lfs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                path = urlsplit(self.path).path
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, path))
                hub.tokens.add(self.headers.get("Authorization", ""))
                status, headers, content = hub.answer_to(self.command, path, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, format: str, *values: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables under which a process talks to this server alone, with an empty cache."""
        clean = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        return {name: value for name, value in clean.items() if not name.startswith("HF_")} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "*",
        }

    def answer_to(self, verb: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        for part, status in self.refuse.items():
            if part in path:
                return status, self.refusal, b'{"error": "refused"}'
        if verb in ("GET", "HEAD"):
            return self.download(path)
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.json({"url": f"{self.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            modes = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if path.startswith("/lfs/"):
            self._lfs[path.removeprefix("/lfs/")] = body
            return 200, {}, b""
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.uploaded[line["value"]["path"]] = self._lfs[line["value"]["oid"]]
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            return self.json({"commitUrl": f"{self.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})
        return 404, {}, b""

    def download(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Answer what a download asks for."""
        api, resolve = f"/api/models/{self.repository}", f"/{self.repository}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.json(
                {"id": self.repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            )
        if path.startswith(f"{api}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}
                for name, raw in self.files.items()
            ]
            return self.json(tree)
        if path.startswith(resolve) and (raw := self.files.get(path.removeprefix(resolve))) is not None:
            return 200, {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": COMMIT}, raw
        return 404, {"X-Error-Code": "RevisionNotFound" if "revision" in path else "RepoNotFound"}, b""

    @staticmethod
    def json(value: object, kind: str = "application/json") -> tuple[int, dict[str, str], bytes]:
        """Answer with JSON."""
        return 200, {"Content-Type": kind}, json.dumps(value).encode()

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were sent, in order of name."""
        return sorted(
            path.rpartition("/")[2] for verb, path in self.requests if verb == "GET" and "/resolve/" in path
        )

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self.server.server_close()
