"""A server on this machine that answers the few requests with which `datasets` reads Parquet files from the hub."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

COMMIT = "0123456789" * 4


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append(path)
        if self.server.folder is None:
            self.close_connection = True  # hang up without an answer
            return
        words = path.strip("/").split("/")
        if words[:2] == ["api", "datasets"]:
            self._describe(self.server.folder / "/".join(words[2:4]), words[4:])
        elif words[0] == "datasets":
            self._send_file(self.server.folder / "/".join(words[1:3]) / "/".join(words[5:]))
        else:
            self._send(404)

    do_HEAD = do_GET

    def _describe(self, repository: Path, words: list[str]):
        if words[0] == "tree":
            folder = repository / "/".join(words[2:])
            items = sorted(folder.iterdir()) if folder.is_dir() else []
            files = [
                {
                    "type": "directory" if item.is_dir() else "file",
                    "path": item.relative_to(repository).as_posix(),
                    "size": 0 if item.is_dir() else item.stat().st_size,
                    "oid": "0" * 40,
                }
                for item in items
            ]
            self._send(200, json.dumps(files).encode())
        elif repository.is_dir():
            self._send(200, json.dumps({"id": "/".join(repository.parts[-2:]), "sha": COMMIT, "siblings": []}).encode())
        else:
            self._send(404, headers={"X-Error-Code": "RepoNotFound"})

    def _send_file(self, file: Path):
        commit = {"X-Repo-Commit": COMMIT}
        if file.is_file():
            data = file.read_bytes()
            self._send(200, data, {**commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        else:
            self._send(404, headers={**commit, "X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextlib.contextmanager
def serve(folder: Path | None):
    """Yield (address, list of the paths asked for so far). Without a folder, the server hangs up on every request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.folder, server.requests = folder, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
