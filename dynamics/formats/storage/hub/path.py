"""`HubPath`: a file or folder of a model repository, with the methods of `pathlib.Path`."""

import io
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote

from dynamics.errors import FormatError
from dynamics.formats.storage.hub.repository import MAIN, Repository
from dynamics.formats.storage.hub.transport import HubError, HubFile

_URL = re.compile(
    r"hf://(?:models/)?(?P<name>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<inner>.*))?",
)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")


class _Status(NamedTuple):
    st_size: int


class HubPath:
    """A place in a model repository: hf://org/name@revision/folder/file.

    Args:
        repository: the repository.
        revision: a branch, tag or commit; None for main, which the address does not spell.
        inner: the path in it; empty for its top.
        label: what the revision is called where its name does not say it: the step of a commit.
    """

    def __init__(
        self, repository: Repository, revision: str | None = None, inner: str = "", label: str = ""
    ):
        self.repository = repository
        self.revision = revision
        self.inner = inner
        self.label = label

    @property
    def home(self) -> "HubPath":
        """The repository itself."""
        return HubPath(self.repository)

    def model(self, name: object, revision: object = None) -> "HubPath | None":
        """Another model that this one names; None where there is none that can be read."""
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            return None
        revision = revision if isinstance(revision, str) and revision else None
        found = HubPath(self.repository.other(name), revision)
        try:
            return found if found.is_dir() else None
        except HubError:
            return None

    @property
    def commit(self) -> str:
        """The commit of its revision."""
        return self.repository.commit(self.revision or MAIN)

    @property
    def file(self) -> HubFile | None:
        """The file here; None for a folder, or nothing."""
        if not self._may_exist:
            return None
        return self.repository.tree(self.commit).get(self.inner)

    @property
    def _may_exist(self) -> bool:
        """Whether there is a revision: a repository may be without main."""
        return self.revision is not None or MAIN in self.repository.refs

    @property
    def name(self) -> str:
        """See `pathlib.PurePath.name`; that of the top is its revision's, or the repository's."""
        if self.inner:
            return self.inner.rpartition("/")[2]
        return self.label or self.revision or self.repository.name.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """See `pathlib.PurePath.stem`."""
        return PurePosixPath(self.name).stem if self.inner else self.name

    @property
    def suffix(self) -> str:
        """See `pathlib.PurePath.suffix`."""
        return PurePosixPath(self.name).suffix if self.inner else ""

    @property
    def parent(self) -> "HubPath":
        """See `pathlib.PurePath.parent`; above a revision is the repository."""
        return self._at(self.inner.rpartition("/")[0]) if self.inner else self.home

    @property
    def parents(self) -> list["HubPath"]:
        """See `pathlib.PurePath.parents`."""
        above: list[HubPath] = []
        at = self
        while at.parent != at:
            at = at.parent
            above.append(at)
        return above

    def __truediv__(self, other: object) -> "HubPath":
        parts = [each for each in str(other).split("/") if each not in ("", ".")]
        return self._at("/".join([*([self.inner] if self.inner else []), *parts]))

    def _at(self, inner: str) -> "HubPath":
        return HubPath(self.repository, self.revision, inner, self.label)

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repository.name}{revision}" + f"/{self.inner}" * bool(self.inner)

    def __repr__(self) -> str:
        return f"HubPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HubPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "HubPath") -> bool:
        return str(self) < str(other)

    def absolute(self) -> "HubPath":
        """Itself."""
        return self

    resolve = absolute

    def is_relative_to(self, other: "HubPath") -> bool:
        """See `pathlib.PurePath.is_relative_to`."""
        return other == self or other in self.parents

    def is_file(self) -> bool:
        """See `pathlib.Path.is_file`."""
        return self.file is not None

    def is_dir(self) -> bool:
        """See `pathlib.Path.is_dir`."""
        return self._may_exist and self.repository.folder(self.commit, self.inner) is not None

    def exists(self) -> bool:
        """See `pathlib.Path.exists`."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def listing(self) -> dict[str, bool]:
        """Name -> whether it is a folder, of what is in this folder."""
        found = self.repository.folder(self.commit, self.inner)
        if found is None:
            raise NotADirectoryError(str(self))
        return found

    def iterdir(self) -> Iterator["HubPath"]:
        """See `pathlib.Path.iterdir`."""
        return (self / name for name in self.listing())

    def matches(self) -> list["HubPath"]:
        """The places that its path stands for, as a glob."""
        pattern = self.inner.split("/")
        files = self.repository.tree(self.commit)
        every = {**files, **{str(p): None for f in files for p in PurePosixPath(f).parents}}
        return [
            self._at(each)
            for each in sorted(every)
            if len(parts := each.split("/")) == len(pattern)
            and all(fnmatchcase(part, glob) for part, glob in zip(parts, pattern, strict=True))
        ]

    def stat(self) -> _Status:
        """Its size."""
        return _Status(self._known_file().size)

    @property
    def origin(self) -> str:
        """What the hub states of its content, wherever it lies."""
        file = self._known_file()
        return f"hub {file.content}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading. What is read of it is kept."""
        return io.BufferedReader(_Reader(self, self._known_file()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """See `pathlib.Path.read_text`."""
        file = self._known_file()
        return self.repository.metadata(self.commit, file, 0, file.size).decode(encoding)

    def read_range(self, offset: int, length: int) -> bytes:
        """The bytes of a part of the file, or fewer where it ends before."""
        file = self._known_file()
        length = max(min(length, file.size - offset), 0)
        # Files that say where their tensors lie do so at their beginning: safetensors, GGUF.
        read = self.repository.metadata if offset <= 8 else self.repository.tensor
        return read(self.commit, file, offset, length)

    def is_kept(self, offset: int, length: int) -> bool:
        """Whether a part of the file can be read without a request."""
        return self.repository.is_kept(self._known_file(), offset, length)

    def _known_file(self) -> HubFile:
        file = self.file
        if file is None:
            raise FileNotFoundError(f"there is no {self}")
        return file


class _Reader(io.RawIOBase):
    """A file that is fetched piece by piece."""

    def __init__(self, path: HubPath, file: HubFile):
        self._path, self._file, self._at = path, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = {0: 0, 1: self._at, 2: self._file.size}[whence] + offset
        if self._at < 0:
            raise OSError(f"a position of {self._at}")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._file.size - self._at), 0)
        where = self._path
        content = where.repository.metadata(where.commit, self._file, self._at, length)
        buffer[:length] = content
        self._at += length
        return length


def hub_path(url: str) -> HubPath | None:
    """The place that an address stands for; None where it is none of a model repository.

    Nothing is asked of the hub yet.

    Raises:
        FormatError: it names no repository.
        DynamicsError: huggingface_hub is not installed.
    """
    if not url.startswith("hf://") or url[5:].partition("/")[0] in _OTHER_KINDS:
        return None
    match = _URL.fullmatch(url.rstrip("/"))
    if match is None:
        raise FormatError(f"{url} names no model of the hub; give hf://ORG/NAME.")
    revision = match["revision"]
    inner = "/".join(each for each in (match["inner"] or "").split("/") if each)
    if ".." in inner.split("/"):
        raise FormatError(f"{url} leads out of its repository; leave '..' out.")
    revision = None if revision is None else unquote(revision)
    return HubPath(Repository(match["name"]), revision, inner)


__all__ = ["HubError", "HubPath", "hub_path"]
