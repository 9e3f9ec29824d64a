"""Requests to the hub, all of them by `huggingface_hub`: its session, headers, endpoint and errors.

What may pass (a busy server, a lost connection) is tried again, later each time. What does not pass
becomes a `HubError` of one line, which never holds a token or a signed address.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar
from urllib.parse import urljoin, urlparse

from dynamics.errors import FormatError, one_line, require_extra

T = TypeVar("T")

# Seconds before each further try: as huggingface_hub's own back-off.
_WAITS = (1, 2, 4, 8, 8)
_REFUSED_FOR = 30  # seconds
_LONGEST_WAIT = 320  # the hub counts requests in windows of five minutes
_PASSING = (408, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_RESET = re.compile(r";\s*t\s*=\s*(\d+)")  # of the header `ratelimit`: seconds until it resets


class HubError(FormatError):
    """The hub does not give what was asked for, and asking again would not help."""


class NoRevisionError(HubError):
    """A repository has no revision of a name."""


class _PassingError(Exception):
    """Something that may be over at the next try."""

    def __init__(self, what: str, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class HubFile:
    """A file of one commit.

    Attributes:
        path: in the repository.
        size: in bytes.
        content: what the hub states of its content, "sha256:..." of a large file, "git:..." else.
    """

    path: str
    size: int
    content: str


class Transport:
    """Asks the hub for one model repository.

    Args:
        name: "org/name".
        endpoint: of the hub; by default that of this process.
    """

    def __init__(self, name: str, endpoint: str | None = None):
        try:
            from huggingface_hub import HfApi
        except ImportError as missing:
            raise require_extra("remote", missing) from missing
        self.name = name
        self._api = HfApi(endpoint, library_name="learning-dynamics")
        self._addresses: dict[str, str] = {}  # content -> signed, so never kept on a disk
        self._lock = Lock()
        self._refused: tuple[HubError, float] | None = None

    def __reduce__(self) -> tuple[type["Transport"], tuple[str, str]]:
        # Workers may have been started before this process chose its hub.
        return Transport, (self.name, self._api.endpoint)

    def refs(self) -> dict[str, str]:
        """Name -> commit of every branch and tag, branches first."""
        found = self._asked(lambda: self._api.list_repo_refs(self.name), first=True)
        named = [*reversed(found.tags), *reversed(found.branches)]
        return {each.name: each.target_commit for each in reversed(named)}

    def commit_of(self, revision: str) -> str:
        """The commit of a revision that is neither a branch nor a tag."""
        found = self._asked(lambda: self._api.model_info(self.name, revision=revision))
        return str(found.sha)

    def titles(self, revision: str) -> list[tuple[str, str]]:
        """(commit, title), the newest first."""
        found = self._asked(lambda: self._api.list_repo_commits(self.name, revision=revision))
        return [(each.commit_id, each.title) for each in found]

    def tree(self, commit: str) -> list[HubFile]:
        """All files of a commit."""

        def listed() -> list[Any]:
            tree = self._api.list_repo_tree(self.name, revision=commit, recursive=True)
            return [each for each in tree if hasattr(each, "blob_id")]

        return [
            HubFile(
                each.path,
                int(each.size),
                f"sha256:{each.lfs.sha256}" if each.lfs else f"git:{each.blob_id}",
            )
            for each in self._asked(listed)
        ]

    def fetch(self, commit: str, file: HubFile, offset: int, length: int) -> bytes:
        """The `length` bytes of a file that begin at byte `offset`."""
        if length == 0:
            return b""
        return self._asked(lambda: self._fetched(commit, file, offset, length))

    def _fetched(self, commit: str, file: HubFile, offset: int, length: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        ranged = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        kept = url = self._addresses.get(file.content)
        if url is None:
            url = hf_hub_url(self.name, file.path, revision=commit, endpoint=self._api.endpoint)
            headers = {**build_hf_headers(library_name="learning-dynamics"), **ranged}
        else:
            headers = ranged
        for _ in range(_MOST_REDIRECTS):
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=False
            ) as response:
                status = response.status_code
                if status in _REDIRECTS:
                    target = urljoin(url, response.headers["Location"])
                    if urlparse(target)[:2] != urlparse(url)[:2]:  # the token stays at the hub
                        headers = ranged
                        with self._lock:
                            self._addresses[file.content] = target
                    url = target
                    continue
                if status in _PASSING:
                    raise _PassingError(f"status {status}", _told_wait(response.headers))
                if status >= 400 and headers is ranged:  # a signed address expires
                    with self._lock:
                        self._addresses.pop(file.content, None)
                    if kept is not None:
                        raise _PassingError(f"status {status}", 0)
                    raise _PassingError(f"status {status}")
                if status >= 400:
                    response.read()
                    hf_raise_for_status(response)
                if status != 206 and (offset, length) != (0, file.size):
                    raise HubError(
                        f"{self._where} cannot be read: the server of {file.path} gives no byte "
                        "ranges; download it."
                    )
                content = bytes(response.read())
                said = str(response.headers.get("Content-Range", "")).rpartition("/")[2]
                if said.isdigit() and int(said) != file.size:
                    raise HubError(
                        f"{self._where}: {file.path} has {said} bytes, and its commit says "
                        f"{file.size}; it was changed meanwhile, run it again."
                    )
                if len(content) != length:
                    raise _PassingError(f"{len(content)} of {length} bytes")
                return content
        raise HubError(f"{self._where} cannot be read: {file.path} is redirected without end.")

    @property
    def _where(self) -> str:
        return f"hf://{self.name}"

    def _asked(self, ask: Callable[[], T], *, first: bool = False) -> T:
        """What `ask` returns. At the first request, no answer at all is an answer."""
        if self._refused is not None and time.monotonic() < self._refused[1]:
            raise self._refused[0]
        problem: Exception = HubError(self._where)
        for wait in (*_WAITS, None):
            try:
                return ask()
            except FormatError:
                raise
            except Exception as error:
                passing = _as_passing(error)
                if passing is None or (first and passing.wait is None and _is_network(error)):
                    raise self._told(error) from None
                problem = error
            if wait is None:
                break
            time.sleep(wait if passing.wait is None else min(passing.wait, _LONGEST_WAIT))
        raise self._told(problem) from None

    def _told(self, error: Exception) -> HubError:
        """The error as one line, without the address and the headers of the request."""
        from huggingface_hub import errors

        endpoint = self._api.endpoint
        log_in = "log in (hf auth login) or set HF_TOKEN"
        if isinstance(error, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set, and the hub must be asked; unset it, or download first"
        elif isinstance(error, errors.GatedRepoError):
            why = f"it is gated; accept its conditions at {endpoint}/{self.name}, and {log_in}"
        elif isinstance(error, errors.RevisionNotFoundError):
            return NoRevisionError(f"{self._where} has no such revision.")
        elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            why = f"{endpoint} has no model of that name, or it is private; check it, or {log_in}"
        elif isinstance(error, errors.HfHubHTTPError):
            status = _status_of(error)
            why = f"{endpoint} answers with status {status}" + "; try again later" * (
                status in _PASSING
            )
        elif isinstance(error, _PassingError):
            why = f"{endpoint} does not give its files ({error}); try again later"
        elif _is_network(error):
            why = f"{endpoint} does not answer ({type(error).__name__}); check the network"
        else:
            why = f"{type(error).__name__}: {one_line(error)[:200]}"
        told = HubError(f"{self._where} cannot be read: {why}.")
        whole = isinstance(error, errors.OfflineModeIsEnabled | errors.GatedRepoError)
        if whole or (_is_network(error) and _status_of(error) is None):
            self._refused = (told, time.monotonic() + _REFUSED_FOR)  # 154 revisions, one answer
        return told


def _as_passing(error: Exception) -> _PassingError | None:
    if isinstance(error, _PassingError):
        return error
    status = _status_of(error)
    if status in _PASSING:
        return _PassingError(f"status {status}", _told_wait(error.response.headers))  # type: ignore[attr-defined]
    if status is None and _is_network(error):
        return _PassingError(type(error).__name__)
    return None


def _status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: Exception) -> bool:
    """Whether a request got no answer; huggingface_hub closes its client after such an error."""
    module = type(error).__module__.partition(".")[0]
    closed = isinstance(error, RuntimeError) and "closed" in str(error)
    return closed or isinstance(error, OSError) or module.startswith(("httpx", "httpcore"))


def _told_wait(headers: Any) -> float | None:
    """How many seconds a server asks to wait; None where it does not say."""
    retry_after = str(headers.get("Retry-After", ""))
    if retry_after.isdigit():
        return float(retry_after)
    reset = _RESET.search(str(headers.get("ratelimit", "")))
    return float(reset[1]) + 1 if reset else None
