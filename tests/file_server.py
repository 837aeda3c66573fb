"""An HTTP server of files in memory, with ranges. Answers as the Hugging Face Hub does, for one data set."""

from __future__ import annotations

import json
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "someone/captions"
_API = f"/api/datasets/{REPO}"
_FILES = f"/datasets/{REPO}/resolve/main/"


class FileServer:
    """Context manager. `files`: bytes by path; each is at `url`/PATH and at hf://datasets/someone/captions/PATH
    for whoever has `url` in HF_ENDPOINT."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.ranges: list[tuple[str, str | None]] = []
        """(path, Range header) of each download."""

    def __enter__(self) -> FileServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._get(self)

            def do_HEAD(self) -> None:
                outer._get(self)

            def do_POST(self) -> None:
                asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                paths = asked.get("paths", [])
                outer._json(self, [entry for path in paths for entry in outer._entry(path)])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _get(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith(f"{_API}/tree/main"):
            folder = path.removeprefix(f"{_API}/tree/main").strip("/")
            recursive = "recursive=true" in request.path.lower()
            self._json(request, self._tree(f"{folder}/" if folder else "", recursive))
        elif path in (_API, f"{_API}/revision/main"):
            self._json(request, {"id": REPO, "sha": "0" * 40, "private": False, "siblings": []})
        else:
            self._file(request, path.removeprefix(_FILES).removeprefix("/"))

    def _entry(self, path: str) -> list[dict]:
        """What the Hub says of a path: a file, a folder, or nothing."""
        if path in self.files:
            data = self.files[path]
            return [{"type": "file", "path": path, "size": len(data), "oid": sha1(data).hexdigest()}]
        below = any(name.startswith(f"{path}/") for name in self.files)
        return [{"type": "directory", "path": path, "oid": "1" * 40}] if below else []

    def _tree(self, prefix: str, recursive: bool) -> list[dict]:
        found = {}
        for name in sorted(self.files):
            parts = name.removeprefix(prefix).split("/") if name.startswith(prefix) else []
            for depth in range(1, len(parts) + 1 if recursive else 2):
                path = prefix + "/".join(parts[:depth])
                found[path] = self._entry(path)
        return [entry for entries in found.values() for entry in entries]

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self._answer(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        data = self.files.get(path)
        if data is None:
            self._answer(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        asked = request.headers.get("Range")
        if request.command == "GET":
            self.ranges.append((path, asked))
        about = {"Accept-Ranges": "bytes", "ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        if asked is None:
            self._answer(request, 200, data, about)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin = int(first) if first else max(0, len(data) - int(last))
        end = min(len(data), int(last) + 1) if first and last else len(data)
        about["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._answer(request, 206, data[begin:end], about)

    def _answer(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
