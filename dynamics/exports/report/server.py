"""A report of a run in progress: a server on this machine that shows the newest page."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dynamics.errors import DynamicsError

_HOST = "127.0.0.1"
_WAITING = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="refresh" content="2"><title>Waiting for the first record</title></head>
<body><main><h1>Waiting for the first record</h1><p>This page loads itself anew.</p></main></body>
</html>
"""


class LivePage:
    """The newest page, and a number that changes with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._version = 0

    @property
    def version(self) -> str:
        """Of the page that is shown; "0" before there is one."""
        return str(self._version)

    @property
    def next_version(self) -> str:
        """Of the page that is shown next."""
        return str(self._version + 1)

    def show(self, path: Path) -> None:
        """Show the page in a file from now on."""
        with self._lock:
            self._path = path
            self._version += 1

    def read(self) -> bytes:
        """The page."""
        with self._lock:
            return _WAITING.encode() if self._path is None else self._path.read_bytes()


@contextmanager
def serving(page: LivePage, port: int) -> Iterator[str]:
    """Serve a page on this machine alone while the context lasts; gives its address.

    Args:
        page: what is shown.
        port: 0 for any that is free.

    Raises:
        DynamicsError: the port is taken, or there is no such port.
    """
    try:
        server = ThreadingHTTPServer((_HOST, port), _handler(page))
    except (OSError, OverflowError) as error:
        raise DynamicsError(
            f"Cannot serve at port {port}: {error}. Choose another one (--port; 0 for any)."
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{_HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def _handler(page: LivePage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers with the page, or with its version; with nothing else."""

        def do_GET(self) -> None:
            # Another site's name that leads to this machine may not read the page.
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (_HOST, "localhost"):
                return self.send_error(403)
            if self.path == "/version":
                return self._answer(page.version.encode(), "text/plain")
            if self.path.partition("?")[0] == "/":
                return self._answer(page.read(), "text/html; charset=utf-8")
            return self.send_error(404)

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing: the terminal has the lines of the run."""

    return Handler
