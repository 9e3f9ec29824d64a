"""A report of a run in progress: made anew with each record, shown by a server on this machine."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Unpack

from dynamics import schema
from dynamics.analysis.execution import Execution
from dynamics.analysis.following import follow
from dynamics.analysis.selection import SelectionOptions
from dynamics.errors import DynamicsError
from dynamics.exports.files import check_file
from dynamics.exports.report.audits import checks_of_run
from dynamics.exports.report.report import write_report
from dynamics.exports.report.runs import comparison_of
from dynamics.exports.report.sources import with_audits
from dynamics.runs.run import Run

_HOST = "127.0.0.1"
_WAITING = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="refresh" content="2"><title>Waiting for the first record</title></head>
<body><main><h1>Waiting for the first record</h1><p>This page loads itself anew.</p></main></body>
</html>
"""


def follow_report(
    run: Callable[[], Run],
    output: Path,
    execution: Execution,
    *,
    name: str,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    port: int = 8000,
    interval: float = 10.0,
    title: str | None = None,
    audit: bool = True,
    overwrite: bool = False,
    command: str | None = None,
    **choice: Unpack[SelectionOptions],
) -> None:
    """Serve the report of a run, made anew whenever the run has changed, until `stopped` says so.

    The last report stays in the file.

    Args:
        run: opens the run.
        output: the file.
        execution: how the run is measured.
        name: what the run is called.
        stopped: whether to end.
        say: prints a line.
        port: of the server on this machine; 0 for any that is free.
        interval: seconds between two looks.
        title: see `report`.
        audit: whether the run is audited each time; that reads all of its matrices.
        overwrite: whether the file may replace one that was there before.
        command: see `report`.
        choice: what is measured, see `analyze`.

    Raises:
        OutputExistsError: the file exists and may not be replaced.
        DynamicsError: the port is taken.
    """
    path = check_file(output, overwrite=overwrite)
    page = LivePage()
    with serving(page, port) as address:
        say(f"Serving {address} until Ctrl-C")
        results = follow(
            run,
            stopped=stopped,
            interval=interval,
            waiting=lambda reason: None if reason is None else say(f"waiting: {reason}"),
            execution=execution,
            **choice,
        )
        for result in results:
            comparison = comparison_of(result, name)
            if audit:
                comparison = with_audits(comparison, {name: checks_of_run(run())})
            write_report(comparison, path, title=title, command=command, follow=page.next_version)
            page.show(path)
            say(f"step {int(result[schema.STEP][-1])}: {path}")


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
