"""One model repository: its revisions, the files of its commits, and ranges of their bytes.

A commit never changes, so its tree is kept for ever, and so is the beginning of a file of known
content. Tensors are not kept on the disk: what is measured of them is (`analysis.cache`).
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from threading import RLock
from typing import Any, TypeVar

from dynamics.errors import near
from dynamics.formats.storage.hub.kept import Pieces, Recent, keep, kept
from dynamics.formats.storage.hub.transport import HubFile, NoRevisionError, Transport
from dynamics.runs.run import abridged

T = TypeVar("T")

_AT_ONCE = 8
_PIECE = 64 * 1024
# Ranges so near to each other are fetched in one request: norms and biases lie between matrices.
_GAP, _LONGEST_MERGED, _MOST_MERGED = 4096, 2**24, 2**28
_MOST_AHEAD = 2**27
MAIN = "main"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
Range = tuple[str, int, int]  # content of a file, offset, length


class Repository:
    """A model repository. Each revision stays at the commit that it has when it is first asked for.

    Args:
        name: "org/name".
    """

    def __init__(self, name: str):
        self.name = name
        self._transport = Transport(name)
        self._pieces = Pieces()
        self._refs: dict[str, str] | None = None
        self._commits: dict[str, str] = {}
        self._trees: dict[str, dict[str, HubFile]] = {}
        self._folders: dict[str, dict[str, dict[str, bool]]] = {}
        self._places: dict[str, tuple[str, HubFile]] = {}  # content -> a commit that has it
        self._noted: dict[tuple[str, int, int], None] = {}
        self._others: dict[str, Repository] = {}
        self._history: list[str] = []
        self._start()

    def _start(self) -> None:
        self._lock = RLock()
        self._recent = Recent()
        self._pool: ThreadPoolExecutor | None = None
        self._plan: list[Range] = []
        self._position: dict[Range, int] = {}
        self._merged: dict[Range, Range] = {}
        self._ahead: dict[Range, Future[None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        running = ("_lock", "_recent", "_pool", "_plan", "_position", "_merged", "_ahead")
        return {name: each for name, each in self.__dict__.items() if name not in running}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def refs(self) -> dict[str, str]:
        """Name -> commit of every branch and tag; pull requests are left out."""
        with self._lock:
            if self._refs is None:
                self._refs = self._transport.refs()
            return self._refs

    def titles(self, revision: str) -> list[tuple[str, str]]:
        """(commit, title) of every commit of a revision, the newest first."""
        return self._transport.titles(self.commit(revision))

    def commit(self, revision: str) -> str:
        """The commit of a branch, a tag, a commit, or refs/pr/N."""
        with self._lock:
            if revision not in self._commits:
                whole = len(revision) == 40 and set(revision) <= set("0123456789abcdef")
                commit = revision if whole else self.refs.get(revision)
                self._commits[revision] = commit or self._asked_commit(revision)
            return self._commits[revision]

    def _asked_commit(self, revision: str) -> str:
        try:
            return self._transport.commit_of(revision)
        except NoRevisionError:
            names = list(self.refs)
            raise NoRevisionError(
                f"hf://{self.name} has no branch, tag or commit {revision!r}"
                f"{near(revision, names)}; it has {abridged(names) or 'none'}."
            ) from None

    def tree(self, commit: str) -> dict[str, HubFile]:
        """Path -> file of everything in a commit."""
        found = self._trees.get(commit)
        if found is None:
            key = f"tree of {self.name}, commit {commit}"
            text = kept(key)
            if text is None:
                files = self._transport.tree(commit)
                keep(key, json.dumps([asdict(each) for each in files]).encode())
            else:
                files = [HubFile(**each) for each in json.loads(text)]
            found = {each.path: each for each in files}
            with self._lock:
                self._trees[commit] = found
                for each in files:
                    self._places.setdefault(each.content, (commit, each))
        return found

    def folder(self, commit: str, path: str) -> dict[str, bool] | None:
        """Name -> whether it is a folder, of what is in a folder; None where there is no such."""
        with self._lock:
            if commit not in self._folders:
                folders: dict[str, dict[str, bool]] = {"": {}}
                for each in self.tree(commit):
                    above, _, name = each.rpartition("/")
                    folders.setdefault(above, {})[name] = False
                    while above:
                        parent, _, name = above.rpartition("/")
                        folders.setdefault(parent, {})[name] = True
                        above = parent
                self._folders[commit] = folders
            return self._folders[commit].get(path)

    def other(self, name: str) -> "Repository":
        """Another repository that this one names, such as that of a base model."""
        with self._lock:
            return self._others.setdefault(name, Repository(name))

    def prepare(self, commits: Iterable[str]) -> None:
        """Ask for the trees of many commits at once: the steps of a run."""
        self._history = list(commits)
        self._at_once([partial(self.tree, each) for each in dict.fromkeys(self._history)])

    @property
    def family(self) -> list["Repository"]:
        """This one, and the others that it has named."""
        return [self, *self._others.values()]

    @property
    def weights(self) -> int:
        """Bytes of all files of weights in the commits that are looked at."""
        trees = [self._trees[each] for each in self._history or self._trees]
        return sum(f.size for tree in trees for f in tree.values() if f.path.endswith(WEIGHTS))

    def prepare_alike(self, commits: Iterable[str], *, folders: bool = False) -> None:
        """Fetch of many commits at once the parts of files that were fetched of those before.

        With `folders`, of files of their names in other folders, too.
        """

        def kind(path: str) -> str:
            return f"{path.count('/')} {path.rpartition('/')[2]}" if folders else path

        noted: dict[str, dict[tuple[int, int], None]] = {}
        for path, offset, length in self._noted:
            noted.setdefault(kind(path), {})[offset, length] = None

        def fetch(commit: str, file: HubFile) -> None:
            for offset, length in noted[kind(file.path)]:
                at = offset if offset >= 0 else max(file.size + offset, 0)
                self.metadata(commit, file, at, max(min(length, file.size - at), 0))

        files = {
            file.content: partial(fetch, commit, file)
            for commit in dict.fromkeys(commits)
            for path, file in self.tree(commit).items()
            if kind(path) in noted
        }
        self._at_once(list(files.values()))

    def metadata(self, commit: str, file: HubFile, offset: int, length: int) -> bytes:
        """A part of a file that says where its tensors lie, or a small file; it is kept."""
        found = self._pieces.beginning(file.content, offset, length)
        from_end = offset >= max(file.size - _PIECE, 1)
        with self._lock:
            at = offset - file.size if from_end else offset
            self._noted[file.path, at, length] = None
        if len(found) == length:
            return found
        first, last = offset + len(found), offset + length
        if file.size <= _PIECE:
            first, last = 0, file.size
        elif from_end:
            first, last = file.size - _PIECE, file.size
        elif not found:
            first = 0 if first < _PIECE else first
            last = min(max(last, first + _PIECE), file.size)
        piece = self._transport.fetch(commit, file, first, last - first)
        self._pieces.add(file.content, first, piece)
        return self._pieces.beginning(file.content, offset, length)

    def is_kept(self, file: HubFile, offset: int, length: int) -> bool:
        """Whether a part of a file can be read without a request."""
        return len(self._pieces.beginning(file.content, offset, length)) == length

    def tensor(self, commit: str, file: HubFile, offset: int, length: int) -> bytes:
        """A part of a file that holds numbers: no byte more is fetched."""
        found = self._pieces.beginning(file.content, offset, length)
        if len(found) == length:
            return found
        key = (file.content, offset, length)
        self._fetch_ahead(key)
        return self._range(key, commit, file)

    def expect(self, ranges: Iterable[Range]) -> tuple[int, int]:
        """Say which tensors will be read, in which order: they are fetched ahead, some at once.

        Returns:
            How many bytes will be fetched of this repository, in how many requests.
        """
        plan = list(dict.fromkeys(each for each in ranges if self._to_fetch(each)))
        small = sum(length for *_, length in plan) <= _MOST_MERGED
        merged = _merged(plan) if small else {}
        with self._lock:
            for each in list(self._ahead.values()):
                each.cancel()
            self._ahead = {}
            self._plan, self._merged = plan, merged
            self._position = {each: at for at, each in enumerate(plan)}
        requests = {merged.get(each, each) for each in plan}
        return sum(map(self._to_fetch, requests)), len(requests)

    def _to_fetch(self, range: Range) -> int:
        """How many bytes of a range have to be fetched; 0 for a file of another repository."""
        content, offset, length = range
        if content not in self._places:
            return 0
        return length - len(self._pieces.beginning(content, offset, length))

    def _fetch_ahead(self, key: Range) -> None:
        with self._lock:
            at = self._position.get(key)
            if at is None:
                return
            size = 0
            for each in self._plan[at:]:
                size += each[2]
                if len(self._ahead) >= 2 * _AT_ONCE or (self._ahead and size > _MOST_AHEAD):
                    break
                whole = self._merged.get(each, each)
                if self._recent.get(each) is None and whole not in self._ahead:
                    self._ahead[whole] = self._threads.submit(self._get_merged, whole)

    def _range(self, key: Range, commit: str, file: HubFile) -> bytes:
        whole = self._merged.get(key, key)
        with self._lock:
            coming = self._ahead.get(whole)
        found = self._recent.get(key)  # after that: what has just come is not coming any more
        if found is None and coming is not None:
            coming.result()
            found = self._recent.get(key)
        if found is None:
            found = self._fetched(commit, file, key[1], key[2])
            self._recent.put(key, found)
        return found

    def _get_merged(self, whole: Range) -> None:
        try:
            commit, file = self._places[whole[0]]
            content = self._fetched(commit, file, whole[1], whole[2])
            with self._lock:
                parts = [each for each, into in self._merged.items() if into == whole]
            for each in parts or [whole]:
                first = each[1] - whole[1]
                self._recent.put(each, content[first : first + each[2]])
        finally:
            with self._lock:
                self._ahead.pop(whole, None)

    def _fetched(self, commit: str, file: HubFile, offset: int, length: int) -> bytes:
        """The bytes, of which the beginning may lie in a piece that is kept."""
        found = self._pieces.beginning(file.content, offset, length)
        rest = length - len(found)
        return found + self._transport.fetch(commit, file, offset + len(found), rest)

    @property
    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, "hub")
            return self._pool

    def _at_once(self, calls: Sequence[Callable[[], object]]) -> None:
        """Make calls in threads; the first error is raised when the others are over."""
        futures = [self._threads.submit(each) for each in calls]
        try:
            for each in futures:
                each.result()
        except BaseException:
            for each in futures:
                each.cancel()
            raise


def _merged(plan: Sequence[Range]) -> dict[Range, Range]:
    """Range -> the range to fetch in its place, which may hold its neighbours."""
    whole: dict[Range, Range] = {}
    group: list[Range] = []

    def close() -> None:
        if group:
            first, last = group[0][1], max(each[1] + each[2] for each in group)
            whole.update(dict.fromkeys(group, (group[0][0], first, last - first)))
            group.clear()

    for each in sorted(set(plan)):
        if group:
            end = max(other[1] + other[2] for other in group)
            far = each[0] != group[0][0] or each[1] > end + _GAP
            if far or each[1] + each[2] - group[0][1] > _LONGEST_MERGED:
                close()
        group.append(each)
    close()
    return whole
