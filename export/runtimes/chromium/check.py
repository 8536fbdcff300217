"""An exported folder of the `web` profile in onnxruntime-web, in headless Chromium: a page that writes text as a user
sees it.

    python check.py FOLDER … [--json FILE]          SCREENSHOT=docs/browser.png keeps a picture of the page

The page (page.html, page.mjs) is served from here with the runtime's files and the model, runs the reference's ids, and
posts back logits, the tokens it wrote and its speed. Chromium is CHROMIUM, or the first of chromium, chromium-browser,
google-chrome. `--serve` instead of a check: python check.py --serve FOLDER leaves the page at http://localhost:8000.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Reference, figures, greedy_agrees, is_exact, judge, main  # noqa: E402

RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 900  # seconds for a page
MARGIN = 0.25
VERSIONS: dict[str, str] = {}


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves the page, /ort/ (the runtime), /model/ (the export) and request.json; /logits receives float32 rows, in
    their order, and /answer the page's result."""

    def __init__(
        self,
        *args: Any,
        model: Path,
        request: dict[str, Any],
        answers: queue.Queue[dict[str, Any]],
        logits: IO[bytes] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = model
        self.request_data = request
        self.answers = answers
        self.answered = kwargs.pop("answered", threading.Event())
        self.logits = logits
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        path = path.split("?")[0].lstrip("/")
        base = HERE
        name = path or "page.html"
        for prefix, folder in (("model/", self.model), ("ort/", RUNTIME)):
            if path.startswith(prefix):
                base = folder
                name = path.removeprefix(prefix)
        target = (base / name).resolve()
        return str(target if target.is_relative_to(base.resolve()) else base / "none")

    def do_GET(self) -> None:
        if (
            self.path == "/hold"
        ):  # an image of the page: the browser takes its picture when everything has loaded, so when this has
            self.answered.wait(TIMEOUT)
            return self._send(b"")
        if self.path == "/request.json":
            return self._send(json.dumps(self.request_data).encode())
        return super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/logits" and self.logits:
            self.logits.write(body)
            return self._send(b"{}")
        self.answers.put(json.loads(body))
        self._send(b"{}")
        self.answered.set()

    def _send(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")  # threads of WebAssembly need both
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


Server.extensions_map = {
    **http.server.SimpleHTTPRequestHandler.extensions_map,
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    request = {
        "windows": reference.ids.tolist(),
        "prompt": reference.prompt,
        "steps": len(reference.greedy),
        "check": True,
    }
    with tempfile.TemporaryFile() as logits:
        answer = in_browser(folder, request, os.environ.get("SCREENSHOT"), logits)
        found: dict[str, Any] = figures(reference, np.memmap(logits, "<f4", "r", shape=reference.logits.shape))
    VERSIONS.update(answer["versions"])
    fine, about = greedy_agrees(reference, answer["greedy"], MARGIN)
    failures = judge(reference, found, is_exact(folder)) + ([] if fine else [about])
    return found | {"greedy": about.split()[1], "tok_s": answer["tok_s"], "load_s": answer["loaded"]}, failures


def in_browser(
    folder: Path, request: dict[str, Any], picture: str | None = None, logits: IO[bytes] | None = None
) -> dict[str, Any]:
    """What the page posts back; `picture` gets a screenshot of it, `logits` the rows."""
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    handler = functools.partial(
        Server, model=folder.resolve(), request=request, answers=answers, logits=logits, answered=threading.Event()
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ]
        if picture:
            flags += [f"--screenshot={Path(picture).resolve()}", "--window-size=900,560"]
        else:
            flags += ["--remote-debugging-port=0"]  # keeps the page open until it is ended
        command = [_browser(), *flags, f"http://127.0.0.1:{server.server_port}/"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as chromium:
            try:
                return answers.get(timeout=TIMEOUT)
            except queue.Empty:
                raise RuntimeError(f"the page said nothing in {TIMEOUT} s") from None
            finally:
                if picture:
                    chromium.wait(120)
                chromium.terminate()
                server.shutdown()


def _browser() -> str:
    found = os.environ.get("CHROMIUM") or next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(
            f"no browser: install one of {', '.join(BROWSERS)} (apt-get install chromium), or set CHROMIUM"
        )
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        told = {"windows": [[1]], "prompt": 1, "steps": 128}
        serving = functools.partial(Server, model=Path(sys.argv[2]).resolve(), request=told, answers=queue.Queue())
        print("http://localhost:8000 (Ctrl-C ends it)")
        http.server.ThreadingHTTPServer(("127.0.0.1", 8000), serving).serve_forever()
    main("chromium", lambda: VERSIONS, check)
