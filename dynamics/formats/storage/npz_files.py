"""NumPy's .npz: a zip archive of .npy arrays, stored or deflated, read one array at a time.

The archive is not read with numpy.load for three reasons: numpy.load needs a seekable local file,
it unpickles on request, and it allocates as much memory as a file claims to need.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.files import (
    contained,
    one_line,
    origin_of,
    read_range,
    refuse_pointer,
    size_of,
)
from dynamics.formats.storage.tensors import Tensor, UnreadTensor, checked_shape
from dynamics.runs.account import INTEGERS

_SUFFIX = ".npy"
_FLOATS = {2: "float16", 4: "float32", 8: "float64"}
# NumPy refuses longer headers, as parsing them takes long. 12 bytes of magic and length come first.
_LONGEST_HEADER = 10_000 + 12
# One bit of deflate stands for 129 bytes at most.
_DEFLATE_RATIO = 1032
_OBJECTS = "Python objects (pickles, which are not read)"


@dataclass(frozen=True)
class NpzTensor:
    """An array of an .npz file.

    Attributes:
        path: the file.
        offset: where the member's bytes begin in the file.
        packed: size of the member in the file, in bytes.
        unpacked: its size when decompressed, header included, in bytes.
        crc: checksum of the decompressed bytes.
        deflated: whether the member is compressed.
        header: size of the .npy header, in bytes.
        number: NumPy dtype of the numbers, with their byte order.
        shape: of the array.
        fortran: whether its columns are contiguous.
    """

    path: Path
    offset: int
    packed: int
    unpacked: int
    crc: int
    deflated: bool
    header: int
    number: np.dtype
    shape: tuple[int, ...]
    fortran: bool

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return _FLOATS[self.number.itemsize]

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return (str(self.path), self.offset)

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`."""
        file = origin_of(self.path)
        return file and f"{file}|{self.offset}|{self.number.str}|{self.shape}|{self.fortran}"

    def read(self) -> np.ndarray:
        """See `Tensor.read`."""
        raw = read_range(self.path, self.offset, self.packed)
        if self.deflated:
            raw = _inflated(self.path, raw, self.unpacked)
        if len(raw) != self.unpacked or zlib.crc32(raw) != self.crc:
            raise _damage_error(self.path, f"the array at byte {self.offset} has a wrong checksum")
        numbers = np.frombuffer(raw, dtype=self.number, offset=self.header)
        array = numbers.reshape(self.shape, order="F" if self.fortran else "C")
        return array.astype(self.number.newbyteorder("="), copy=False)


def npz_tensors(path: Path, root: Path) -> dict[str, Tensor]:
    """Name -> array of each array in an .npz file. Only float16, float32 and float64 are read.

    Raises:
        FormatError: the file is missing or damaged, or holds no array that can be read.
    """
    contained(path, root)
    size = size_of(path)
    refuse_pointer(path, size)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        arrays: dict[str, Tensor] = {
            member.filename.removesuffix(_SUFFIX): _array(path, size, member)
            for member in members
            if member.filename.endswith(_SUFFIX)
        }
    except FormatError:
        raise
    except Exception as error:  # an archive that makes no sense can raise anything
        raise _damage_error(path, one_line(error)) from error
    if not any(isinstance(array, NpzTensor) for array in arrays.values()):
        raise _nothing_read_error(path, arrays)
    return arrays


def _array(path: Path, size: int, member: zipfile.ZipInfo) -> NpzTensor | UnreadTensor:
    name = member.filename
    if member.flag_bits & 1 or member.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise _damage_error(
            path, f"{name} is encrypted, or compressed in another way than NumPy does it"
        )
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    # Lengths in a local header may differ from those in the directory of the archive.
    local = read_range(path, member.header_offset, 30)
    if local[:4] != b"PK\x03\x04":
        raise _damage_error(path, f"{name} is not where it should be")
    offset = member.header_offset + 30
    offset += int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    most = member.compress_size * (_DEFLATE_RATIO if deflated else 1)
    if offset + member.compress_size > size or member.file_size > most:
        raise _damage_error(path, f"{name} claims more bytes than it can have")
    begin = read_range(path, offset, min(member.compress_size, 2 * _LONGEST_HEADER))
    if deflated:
        begin = _inflated(path, begin, _LONGEST_HEADER, whole=False)
    header, shape, fortran, number = _header(path, name, begin)
    if number.hasobject:
        return UnreadTensor(shape, _OBJECTS)
    if number.kind in "iub":
        return UnreadTensor(shape, INTEGERS)
    if number.kind != "f" or number.itemsize not in _FLOATS:
        return UnreadTensor(shape, f"numbers of the dtype {number}", str(number))
    # Checked before memory is allocated: the size in the directory is what the header needs.
    if header + prod(shape) * number.itemsize != member.file_size:
        raise _damage_error(path, f"{name} is {number} {shape} in {member.file_size} bytes")
    return NpzTensor(
        path,
        offset,
        member.compress_size,
        member.file_size,
        member.CRC,
        deflated,
        header,
        number,
        shape,
        fortran,
    )


def _header(path: Path, name: str, begin: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype]:
    """(size of the header in bytes, shape, whether Fortran order, dtype) of an .npy file."""
    file = io.BytesIO(begin)
    version = np.lib.format.read_magic(file)
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise _damage_error(path, f"{name} has version {version} of the .npy format")
    shape, fortran, number = readers[version](file)
    return file.tell(), checked_shape(shape, f"{path}: {name}"), bool(fortran), number


def _inflated(path: Path, packed: bytes, most: int, whole: bool = True) -> bytes:
    """The first `most` bytes of a deflated stream. With `whole`, the stream must end there."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(packed, most)
        if whole and not stream.eof and stream.decompress(stream.unconsumed_tail, 1):
            raise _damage_error(path, f"an array has more bytes than the {most} that it declares")
    except zlib.error as error:
        raise _damage_error(path, one_line(error)) from error
    return content


def _nothing_read_error(path: Path, arrays: Mapping[str, Tensor]) -> FormatError:
    for name, array in arrays.items():
        if isinstance(array, UnreadTensor) and array.reason == _OBJECTS:
            return FormatError(
                f"{path} holds Python objects as {name}{_SUFFIX}; these are pickles, which are not "
                "read. Save the file without them."
            )
        if array.dtype != "unread":
            return FormatError(
                f"{path} holds {name}{_SUFFIX} as {array.dtype}; only float16, float32 and float64 "
                "are read (NumPy has no bfloat16): save it as float32."
            )
    return FormatError(f"{path} holds no floating-point arrays.")


def _damage_error(path: Path, what: str) -> FormatError:
    return FormatError(f"{path} is not a readable .npz file; it is truncated or damaged: {what}.")
