"""A model hub on this machine: the part of its protocol that huggingface_hub needs to list and fetch a repository.

GET  /api/models/OWNER/NAME/revision/REVISION          the commit and the files
HEAD /OWNER/NAME/resolve/REVISION/FILE                 its ETag, size and commit; of weights a redirect to /cdn/HASH
GET  the same, or /cdn/HASH on another host name       the bytes, from where `Range` says
"""

import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from hub_cache import COMMIT

TOKEN = "hf_right"
WEIGHTS = (".safetensors", ".gguf", ".bin")


@dataclass
class Repository:
    """Files by name; who may read them; and what goes wrong with a file: "cut", "stall", "missing" or "busy"."""

    files: dict
    access: str = "public"  # or "private", "gated"
    faults: dict = field(default_factory=dict)
    commit: str = COMMIT

    @classmethod
    def of(cls, folder, **options):
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, **options)


class HubServer:
    """Serves `repositories` by "owner/name"; `requests` counts what was asked, by method and path."""

    def __init__(self):
        self.repositories = {}
        self.requests = Counter()
        self.authorized = []  # paths that were asked for with a token
        self.stop_stalling = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}/cdn/"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.stop_stalling.set()
        self.server.shutdown()
        self.server.server_close()

    def fetched(self):
        """How many times each file's bytes were asked for."""
        return {
            path.rpartition("/")[2]: n for (method, path), n in self.requests.items() if self._is_file(method, path)
        }

    @staticmethod
    def _is_file(method, path):
        return method == "GET" and not path.startswith("/api/")


class Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(self.path.partition("?")[0])
        self.hub.requests[self.command, path] += 1
        if "Authorization" in self.headers:
            self.hub.authorized.append(path)
        if path.startswith("/cdn/"):
            return self.send_blob(path.removeprefix("/cdn/"))
        api = path.startswith("/api/models/")
        owner, name, _, *rest = path.removeprefix("/api/models/" if api else "/").split("/")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        known = "Authorization" in self.headers
        if repository is None or (repository.access == "private" and not known):
            return self.refuse(404 if known else 401, "RepoNotFound")
        if rest[0] not in ("main", "old", repository.commit):
            return self.refuse(404, "RevisionNotFound")
        if "listing" in repository.faults:
            return self.fail(repository.faults["listing"])
        if api:
            siblings = [{"rfilename": name} for name in repository.files]
            return self.send(200, json.dumps({"id": f"{owner}/{name}", "sha": repository.commit, "siblings": siblings}))
        if repository.access == "gated" and not known:
            return self.refuse(403, "GatedRepo")
        return self.send_file(repository, "/".join(rest[1:]))

    def send_file(self, repository, name):
        data = repository.files.get(name)
        if data is None or repository.faults.get(name) == "missing":
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        digest = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{digest}"'}
        if not name.endswith(WEIGHTS):
            return self.send(200, data, headers)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "Location": self.hub.cdn + digest}
        return self.send(302, b"", headers | linked)

    def send_blob(self, digest):
        for repository in self.hub.repositories.values():
            for name, data in repository.files.items():
                if hashlib.sha256(data).hexdigest() == digest:
                    return self.send_range(data, repository.faults.get(name))
        return self.refuse(404, "EntryNotFound")

    def send_range(self, data, fault):
        if fault in ("stall", "busy"):
            return self.fail(fault)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        part = data[start:]
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if fault == "cut" and not start:  # half of it, and the line is dead
            self.send(200, part, headers, send=len(part) // 2)
            self.close_connection = True
            return
        self.send(206 if start else 200, part, headers)

    def fail(self, fault):
        if fault == "busy":
            return self.send(503, b"")
        self.hub.stop_stalling.wait(30)  # says nothing
        self.close_connection = True

    def refuse(self, status, code=None, headers=None, message=None):
        extra = {"X-Error-Code": code} if code else {}
        extra |= {"X-Error-Message": message} if message else {}
        self.send(status, b"", extra | (headers or {}))

    def send(self, status, data, headers=None, send=None):
        data = data.encode() if isinstance(data, str) else data
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:send])
