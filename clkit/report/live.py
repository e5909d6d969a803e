"""The page of a run that goes on, served on this machine only."""

from __future__ import annotations

import contextlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from clkit.errors import ClkitError, ConfigError
from clkit.report import render, so_far

# A page of this server asks only this server.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def version(run_dir: Path) -> str:
    """Something that changes when the run has written something."""
    files = [run_dir / name for name in ("events.jsonl", "status.json", "metrics.json", "samples.json")]
    return " ".join(str(f.stat().st_mtime_ns) if f.is_file() else "-" for f in files)


def make_server(run_dir: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that answers ``/`` with the page and ``/version`` with its version.

    Args:
        run_dir: of a run that goes on, is finished, or has not begun; it need not be there yet.
        port: 0 = any that is free; ``server_port`` says which.

    Raises:
        ConfigError: the port can't be used, or ``run_dir`` is a file.
    """
    if run_dir.is_file():
        raise ConfigError(f"--live: {run_dir} is a file; give the output_dir of a run")
    lock, kept = Lock(), {"version": "", "page": ""}

    def page() -> str:
        with lock:  # drawing takes a second; two requests at once need it once
            now = version(run_dir)
            if kept["version"] != now:
                result = so_far(run_dir)
                kept["page"] = render([] if result is None else [result], live=True)[0]
                kept["version"] = now
            return kept["page"]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in ("/", "/version"):
                self.send_error(404)
                return
            kind = "html" if self.path == "/" else "plain"
            status = 200
            try:
                body = (page() if self.path == "/" else version(run_dir)).encode()
            except ClkitError as error:  # a file of the run is damaged
                status, kind, body = 500, "plain", str(error).encode()
            with contextlib.suppress(ConnectionError):  # the browser went away, as when one reloads while it is drawn
                self._answer(status, kind, body)

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port: {port} can't be used ({error}); give another one, or 0 for any") from error


def serve(run_dir: Path, port: int) -> None:
    """Serve until Ctrl-C."""
    with make_server(run_dir, port) as server:
        if not run_dir.is_dir():
            print(f"{run_dir} is not there yet; the page fills itself when the run begins")
        print(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
