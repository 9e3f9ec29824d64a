"""Parts of files: a range of bytes as a file of its own, and reads that stop at its end."""

import io
from pathlib import Path
from typing import Any, BinaryIO, cast

from dynamics.formats.storage.files import size_of


def open_part(path: Path, first: int, length: int) -> BinaryIO:
    """The `length` bytes of a file that begin at byte `first`, opened as a file."""
    file = cast(BinaryIO, path.open("rb"))
    if first == 0 and length == size_of(path):
        return file
    return cast(BinaryIO, io.BufferedReader(_Window(file, first, length)))


class BoundedFile:
    """A file for an unpickler: a read beyond its end fails before memory is allocated."""

    def __init__(self, file: BinaryIO, length: int):
        self._file, self._length = file, length
        self.readline, self.tell, self.seek = file.readline, file.tell, file.seek

    def read(self, size: int) -> bytes:
        """The next `size` bytes; EOFError where there are fewer."""
        if size > self._length - self._file.tell():
            raise EOFError(f"{size} bytes are missing at its end")
        return self._file.read(size)


class _Window(io.RawIOBase):
    """A range of bytes of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, first: int, length: int):
        self._file, self._first, self._length, self._at = file, first, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._at, 2: self._length}[whence]
        if base + offset < 0:
            raise OSError(f"a position of {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._length - self._at, 0))
        self._file.seek(self._first + self._at)
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
