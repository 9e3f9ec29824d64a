"""What is kept of files on the hub: headers and small files on this disk, tensors in memory."""

import hashlib
import os
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from threading import RLock, get_ident

_MOST_BYTES = 512 * 2**20


class Pieces:
    """Parts of files by their content, so that a part is fetched once, whoever has the file.

    They are kept in the user's cache directory, in `learning-dynamics/hub/`, and never change.
    Where that directory cannot be written, they are kept in memory only.
    """

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[int, bytes]]] = {}
        self._lock = RLock()

    def __reduce__(self) -> tuple[type["Pieces"], tuple[()]]:
        return Pieces, ()

    def beginning(self, content: str, offset: int, length: int) -> bytes:
        """As many of the `length` bytes from `offset` on as are kept without a gap."""
        found = b""
        pieces = self._of(content)
        while len(found) < length:
            at = offset + len(found)
            piece = next((e for e in pieces if e[0] <= at < e[0] + len(e[1])), None)
            if piece is None:
                break
            found += piece[1][at - piece[0] : offset + length - piece[0]]
        return found

    def add(self, content: str, offset: int, piece: bytes) -> None:
        """Keep the bytes from `offset` on."""
        with self._lock:
            self._of(content).append((offset, piece))
        keep(f"{content}@{offset}", piece)

    def _of(self, content: str) -> list[tuple[int, bytes]]:
        with self._lock:
            if content not in self._pieces:
                pieces = []
                with suppress(OSError):
                    for each in _directory().glob(f"{_file_name(content)}@*"):
                        pieces.append((int(each.name.rpartition("@")[2]), each.read_bytes()))
                self._pieces[content] = pieces
            return self._pieces[content]


def kept(key: str) -> bytes | None:
    """What was kept under a key; None where nothing was."""
    try:
        return (_directory() / _file_name(key)).read_bytes()
    except OSError:
        return None


def keep(key: str, value: bytes) -> None:
    """Keep bytes under a key, if the disk takes them; as a whole or not at all."""
    file = _directory() / _file_name(key)
    partial = file.with_name(f".{os.getpid()}-{get_ident()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial.write_bytes(value)
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def _file_name(key: str) -> str:
    """The name of a file; what follows an @ stays readable."""
    content, sign, offset = key.partition("@")
    return hashlib.blake2b(content.encode(), digest_size=20).hexdigest() + sign + offset


def _directory() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "learning-dynamics" / "hub"


class Recent:
    """Ranges that were fetched lately, 512 MiB of them at most: two revisions may share a file."""

    def __init__(self) -> None:
        self._ranges: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = RLock()

    def get(self, key: tuple[str, int, int]) -> bytes | None:
        """The bytes of a range: (content of its file, offset, length)."""
        with self._lock:
            if key not in self._ranges:
                return None
            self._ranges.move_to_end(key)
            return self._ranges[key]

    def put(self, key: tuple[str, int, int], value: bytes) -> None:
        """Keep the bytes of a range, and let go of those that were not asked for longest."""
        with self._lock:
            if key in self._ranges or len(value) > _MOST_BYTES // 2:
                return
            self._ranges[key] = value
            self._bytes += len(value)
            while self._bytes > _MOST_BYTES:
                self._bytes -= len(self._ranges.popitem(last=False)[1])
