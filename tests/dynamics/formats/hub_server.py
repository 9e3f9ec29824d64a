"""A server that speaks the hub's interface, and a second one as its CDN, with signed addresses."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_" + "s3cret" * 5


def commit_id(files, title=""):
    digest = hashlib.sha1(title.encode())
    for path, content in sorted(files.items()):
        digest.update(path.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


@dataclass
class Repo:
    branches: dict = field(default_factory=dict)  # name -> commit
    tags: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)  # commit -> {path: bytes}
    titles: list = field(default_factory=list)  # (commit, title) of main, the newest first
    gated: bool = False
    private: bool = False

    def push(self, folder, branch="main", title="Upload", tag=None, inside=""):
        """Make the files of a folder a commit of a branch."""
        folder = Path(folder)
        files = {
            inside + each.relative_to(folder).as_posix(): each.read_bytes()
            for each in folder.rglob("*")
            if each.is_file()
        }
        if inside and branch in self.branches:
            files = {**self.commits[self.branches[branch]], **files}
        commit = commit_id(files, title)
        self.commits[commit] = files
        if tag is None:
            self.branches[branch] = commit
        else:
            self.tags[tag] = commit
        if branch == "main":
            self.titles.insert(0, (commit, title))
        return commit


@dataclass
class Request:
    server: str
    method: str
    path: str
    bytes: int
    status: int
    range: str | None
    authorization: str | None


class HubServer:
    """Repositories by name, what was asked so far, and what goes wrong.

    Attributes:
        fails: called with each request's (server, path); returns (status, headers) or None.
        ranges: whether the CDN gives byte ranges.
        lifetime: how many requests a signed address is good for.
        latency: seconds before each answer.
    """

    page = 1000

    def __init__(self):
        self.repos = {}
        self.requests = []
        self.fails = lambda server, path: None
        self.ranges = True
        self.lifetime = 10**9
        self.latency = 0.0
        self.cut = None  # called with a path; True: the connection ends in the middle
        self._signed = {}
        self._lock = threading.Lock()

    def repo(self, name):
        return self.repos.setdefault(name, Repo())

    def clear(self):
        self.requests.clear()

    @property
    def fetched(self):
        """Bytes that the CDN has sent."""
        return sum(each.bytes for each in self.requests if each.server == "cdn")

    def asked(self, part, server="hub"):
        return [each for each in self.requests if part in each.path and each.server == server]

    # What is answered: (status, headers, body)

    def answer_hub(self, path, query, headers):
        parts = path.strip("/").split("/")
        if len(parts) < 5:
            return 404, {}, b"{}"
        if parts[0] == "api":
            name, what, rest = "/".join(parts[2:4]), parts[4], unquote("/".join(parts[5:]))
        else:
            name, what = "/".join(parts[:2]), "resolve"
            rest = "/".join(parts[3:])
        repo = self.repos.get(name)
        known = headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            error = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return 401 if not known else 404, error, b"{}"
        if what == "refs":
            return 200, {}, json.dumps(self._refs(repo)).encode()
        if what == "resolve":
            revision, _, file = rest.partition("/")
            return self._resolve(repo, unquote(revision), unquote(file), headers, known)
        commit = self._commit(repo, rest)
        if commit is None:
            error = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            return 404, error, b"{}"
        if what == "tree":
            return self._tree(repo.commits[commit], path, query)
        if what == "commits":
            listed = [
                {"id": c, "title": t, "message": "", "authors": [], "date": "2026-01-01T00:00:00Z"}
                for c, t in repo.titles
            ]
            return 200, {}, json.dumps(listed).encode()
        assert what == "revision", what
        files = [{"rfilename": each} for each in repo.commits[commit]]
        return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": files}).encode()

    def _refs(self, repo):
        def told(kind, refs):
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}
                for name, commit in refs.items()
            ]

        return {
            "branches": told("heads", repo.branches),
            "tags": told("tags", repo.tags),
            "converts": [],
        }

    def _commit(self, repo, revision):
        found = {**repo.tags, **repo.branches}.get(revision, revision)
        return found if found in repo.commits else None

    def _tree(self, files, path, query):
        listed = []
        for name, content in sorted(files.items()):
            entry = {"type": "file", "path": name, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_lfs(name):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
            listed.append(entry)
        folders = {name.rpartition("/")[0] for name in files} - {""}
        listed += [{"type": "directory", "path": each, "oid": "0", "size": 0} for each in folders]
        first = int(query.get("cursor", ["0"])[0])
        headers = {}
        if first + self.page < len(listed):
            more = f"{self.url}{path}?recursive=true&cursor={first + self.page}"
            headers["Link"] = f'<{more}>; rel="next"'
        return 200, headers, json.dumps(listed[first : first + self.page]).encode()

    def _resolve(self, repo, revision, file, headers, known):
        if repo.gated and not known:
            error = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            return 403, error, b"{}"
        commit = self._commit(repo, revision)
        content = repo.commits.get(commit, {}).get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        told = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if not is_lfs(file):
            status, more, body = ranged(content, headers.get("Range"), True)
            return status, {**told, **more}, body
        with self._lock:
            signature = f"{len(self._signed)}-{'x' * 20}"
            self._signed[signature] = [content, self.lifetime]
        location = f"{self.cdn_url}/blob/{Path(file).name}?Signature={signature}"
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": told["ETag"]}
        return 302, {**told, **linked, "Location": location}, b""

    def answer_cdn(self, path, query, headers):
        with self._lock:
            signed = self._signed.get(query.get("Signature", [""])[0])
            if signed is None or signed[1] <= 0:
                return 403, {}, b"expired"
            signed[1] -= 1
        return ranged(signed[0], headers.get("Range"), self.ranges)


def is_lfs(name):
    return name.endswith((".safetensors", ".bin", ".pt", ".zarr"))


def ranged(content, asked, ranges):
    if asked is None or not ranges:
        return 200, {}, content
    first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
    if first >= len(content):
        return 416, {}, b""
    part = content[first : last + 1]
    told = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
    return 206, {"Content-Range": told}, part


def _handler(hub, which):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            url = urlparse(self.path)
            if hub.latency:
                time.sleep(hub.latency)
            failing = hub.fails(which, self.path)
            if failing is not None:
                status, headers, body = *failing, b"{}"
            else:
                answer = hub.answer_hub if which == "hub" else hub.answer_cdn
                status, headers, body = answer(url.path, parse_qs(url.query), self.headers)
            cut = hub.cut is not None and which == "cdn" and hub.cut(self.path)
            if not cut:  # before the answer: a client may go on as soon as it has the headers
                sent = len(body) if status in (200, 206) else 0
                of_headers = (self.headers.get(each) for each in ("Range", "Authorization"))
                hub.requests.append(
                    Request(which, self.command, self.path, sent, status, *of_headers)
                )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if cut:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    return Handler


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # a client that finds no room in it waits for up to a minute


@contextmanager
def serving():
    """A hub that runs, with its CDN."""
    hub = HubServer()
    servers = []
    for which in ("hub", "cdn"):
        server = Server(("127.0.0.1", 0), _handler(hub, which))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{each.server_port}" for each, _ in servers)
    try:
        yield hub
    finally:
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join(10)
