"""Files of torch.save, zipped or of the form before torch 1.6, read without unpickling objects.

`torch_file(path, root)` gives what was saved with a StoredTensor in place of each tensor: the
pickle tells dtype, shape and where in the file the numbers lie, and they are read one tensor at a
time, from a disk or by byte ranges. Nothing that a file names is run, see `unpickling`.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

from dynamics.errors import FormatError
from dynamics.formats.storage.files import contained, one_line, read_range, size_of
from dynamics.formats.storage.tensors import ITEM_BYTES, StoredTensor, checked_shape
from dynamics.formats.storage.unpickling import Inert, TensorUnpickler, callable_from_files

# Larger than the pickle of any state dict: its tensors lie beside it.
_LONGEST_PICKLE = 256 * 2**20
_MOST_NAMES = 1_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "Float8_e4m3fnStorage": "float8_e4m3fn",
    "Float8_e5m2Storage": "float8_e5m2",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_OTHER_BYTES = {"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class Unreadable:
    """A tensor that cannot be read, and why; it matters only if it is asked for."""

    reason: str


@dataclass(frozen=True)
class _Region:
    """A storage: a stretch of bytes of the file."""

    key: str
    dtype: str | None  # None: the type is one that is no dtype of ours
    bytes: int


def torch_file(path: Path, root: Path, first: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote, with StoredTensor and Inert in place of tensors and objects.

    Args:
        path: the file.
        root: the directory that it may not lead out of.
        first: where it begins, for one that lies inside another file.
        length: how long it is there.

    Raises:
        FormatError: the file is missing, truncated, damaged, or not one of torch.save.
    """
    contained(path, root)
    size = size_of(path)
    length = size - first if length is None else length
    if first < 0 or length < 0 or first + length > size:
        raise _damaged(path, size, f"it has no {length} bytes at {first}")
    try:
        with _opened(path, first, length) as file:
            if zipfile.is_zipfile(file):
                return _zipped(path, file, first, length)
            file.seek(0)
            return _legacy(path, cast(BinaryIO, _Bounded(file, length)), first, length)
    except FormatError:
        raise
    except Exception as error:  # a pickle that makes no sense can raise anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise _damaged(path, size, what) from error


def tensors_of(saved: Any, where: str) -> dict[str, StoredTensor]:
    """Name -> floating-point tensor of a (nested) mapping that `torch_file` gave.

    Nested mappings join their keys with dots. Integer tensors and other values are passed over.

    Raises:
        FormatError: it is no mapping, has no tensors, or one that needs an unknown class.
    """
    found: dict[str, StoredTensor] = {}
    for position, (name, value) in enumerate(_leaves(saved, "")):
        if position == _MOST_NAMES:  # one mapping named many times, in mappings of mappings
            raise FormatError(f"{where} holds more than {_MOST_NAMES} names; it is no state dict.")
        if isinstance(value, Unreadable):
            raise FormatError(f"{where}: {name} {value.reason}.")
        if isinstance(value, StoredTensor) and value.dtype in ITEM_BYTES:
            found[name] = value
    if not found:
        raise FormatError(f"{where} holds no tensors by name{_needs(saved)}.")
    return found


def _leaves(value: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < 32:
        for key, each in value.items():
            yield from _leaves(each, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    else:
        yield prefix, value


def _needs(saved: Any) -> str:
    if isinstance(saved, Inert):
        return f": it is an object of {saved.name}, and objects of files are not made; save a dict"
    return ""


def _zipped(path: Path, file: BinaryIO, first: int, length: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: each for each in archive.infolist()}
        pickled = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickled) != 1:
            raise _damaged(path, length, f"a zip archive with {len(pickled)} data.pkl")
        stem = pickled[0].removesuffix("data.pkl")
        for member in members.values():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > length:
                raise _damaged(path, length, f"its member {member.filename!r} is compressed")
        order = members.get(stem + "byteorder")
        if order is not None and order.file_size < 16 and archive.read(order) != b"little":
            raise FormatError(f"{path} holds big-endian numbers; save it on a little-endian host.")
        if members[pickled[0]].file_size > _LONGEST_PICKLE:
            raise _damaged(path, length, f"its pickle has {members[pickled[0]].file_size} bytes")
        data = archive.read(members[pickled[0]])

    def begins(region: _Region) -> int:
        member = members.get(f"{stem}data/{region.key}")
        if member is None or region.bytes > member.file_size:
            raise _damaged(path, length, f"storage {region.key!r} is missing or too short")
        # The lengths of a local header may differ from those of the directory.
        local = read_range(path, first + member.header_offset, 30)
        if local[:4] != b"PK\x03\x04":
            raise _damaged(path, length, f"storage {region.key!r} is not where it should be")
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = member.header_offset + 30 + names
        if start + region.bytes > length:
            raise _damaged(path, length, f"storage {region.key!r} ends beyond the file")
        return first + start

    return _Placed(path, begins).load(io.BytesIO(data), _storage)


def _legacy(path: Path, file: BinaryIO, first: int, length: int) -> Any:
    """The form before torch 1.6: five pickles in a row, then the storages in the order of keys."""
    if _plain(file) != _LEGACY_MAGIC:
        raise _damaged(path, length, "it is no file of torch.save")
    _plain(file), _plain(file)  # protocol version, system information
    body_at = file.tell()
    regions: dict[str, _Region] = {}

    def storage(pid: Any) -> _Region:
        region = _storage(pid)
        regions[region.key] = region
        return region

    # The storages stand behind the pickle: read it once to find its end, and once to place them.
    _Placed(path, lambda region: 0).load(file, storage)
    keys = _plain(file)
    starts, at = {}, file.tell()
    for key in keys:
        region = regions[str(key)]
        if int.from_bytes(read_range(path, first + at, 8), "little") * _item(region) < region.bytes:
            raise _damaged(path, length, f"storage {key!r} is too short")
        starts[region.key] = first + at + 8
        at += 8 + region.bytes
    if at > length:
        raise _damaged(path, length, f"its storages end at {at}")
    file.seek(body_at)
    return _Placed(path, lambda region: starts[region.key]).load(file, _storage)


def _plain(file: BinaryIO) -> Any:
    def refused(_: Any) -> Any:
        raise pickle.UnpicklingError("a tensor where none belongs")

    return TensorUnpickler(cast(io.BufferedIOBase, file), lambda *_: None, refused).load()


def _storage(pid: Any) -> _Region:
    kind, storage_type, key, _, numbers = pid[:5]
    dtype = storage_type if isinstance(storage_type, str) else None
    if kind != "storage" or not isinstance(numbers, int) or not 0 <= numbers < 2**48:
        raise pickle.UnpicklingError(f"a storage of {str(numbers)[:40]} numbers")
    return _Region(str(key), dtype, numbers * _bytes(dtype or "uint8"))


def _bytes(dtype: str) -> int:
    return ITEM_BYTES.get(dtype) or _OTHER_BYTES[dtype]


def _item(region: _Region) -> int:
    return _bytes(region.dtype or "uint8")


class _Placed:
    """Stand-ins for torch's rebuilding functions, which give a tensor its place in a file."""

    def __init__(self, path: Path, begins: Any):
        self._path = path
        self._begins = begins
        self._rebuilders = {
            "_rebuild_tensor": callable_from_files(lambda *args: self._tensor(*args)),
            "_rebuild_tensor_v2": callable_from_files(lambda *args: self._tensor(*args)),
            "_rebuild_tensor_v3": callable_from_files(lambda *args: self._typed(*args)),
            "_rebuild_parameter": callable_from_files(lambda data, *_: data),
            "_rebuild_parameter_with_state": callable_from_files(lambda data, *_: data),
        }

    def load(self, file: Any, storage: Any) -> Any:
        return TensorUnpickler(file, self._stand_in, storage).load()

    def _stand_in(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in self._rebuilders:
            return self._rebuilders[name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and (name in ITEM_BYTES or name in _OTHER_BYTES):
            return name  # a dtype
        if (module, name) == ("torch", "Size"):
            return callable_from_files(lambda sizes=(): tuple(sizes))
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return callable_from_files(_of_subclass)
        if name.startswith("_rebuild_"):
            return callable_from_files(lambda *_: Unreadable(f"needs {module}.{name}"))
        return None

    def _typed(self, storage: Any, first: int, shape: Any, strides: Any, *rest: Any) -> Any:
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else None
        return self._tensor(storage, first, shape, strides, dtype=dtype)

    def _tensor(
        self, storage: Any, first: Any, shape: Any, strides: Any, *_: Any, dtype: str | None = None
    ) -> StoredTensor | Unreadable:
        if not isinstance(storage, _Region):
            return Unreadable("has no storage of its own")
        dtype = dtype or storage.dtype
        if dtype is None:
            return Unreadable("is stored in an unknown type")
        where = f"{self._path}: storage {storage.key!r}"
        sizes, steps = checked_shape(shape, where), checked_shape(strides, where)
        if len(sizes) != len(steps) or not isinstance(first, int) or first < 0:
            raise pickle.UnpicklingError(f"a tensor at {first!r} with strides {steps}")
        contiguous = _contiguous(sizes, steps)
        tensor = StoredTensor(
            self._path,
            self._begins(storage) + first * _bytes(dtype),
            dtype,
            sizes,
            None if contiguous else steps,
        )
        if (first + tensor.extent) * _bytes(dtype) > storage.bytes:
            raise pickle.UnpicklingError(
                f"a tensor of shape {sizes} in a storage of {storage.bytes} bytes"
            )
        # A view that repeats numbers (an expanded tensor) asks for more memory than its file has.
        if dtype in ITEM_BYTES and prod(sizes) > 2 * max(tensor.extent, 1):
            return Unreadable(f"repeats {tensor.extent} numbers into the shape {sizes}")
        return tensor


def _of_subclass(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """A tensor subclass is its plain tensor, where that is how it was saved."""
    rebuilt = function(*args) if getattr(function, "may_be_called", False) else None
    name = getattr(kind, "name", "an unknown class")
    return rebuilt if isinstance(rebuilt, StoredTensor) else Unreadable(f"needs {name}")


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= max(size, 1)
    return True


class _Bounded:
    """A file for an unpickler: a read beyond its end fails before memory is asked for."""

    def __init__(self, file: BinaryIO, length: int):
        self._file, self._length = file, length
        self.readline, self.tell, self.seek = file.readline, file.tell, file.seek

    def read(self, size: int) -> bytes:
        if size > self._length - self._file.tell():
            raise EOFError(f"{size} bytes are missing at its end")
        return self._file.read(size)


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

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
        found = self._file.read(wanted)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(path: Path, first: int, length: int) -> BinaryIO:
    file = cast(BinaryIO, path.open("rb"))
    if first == 0 and length == size_of(path):
        return file
    return cast(BinaryIO, io.BufferedReader(_Window(file, first, length)))


def _damaged(path: Path, size: int, what: str) -> FormatError:
    return FormatError(
        f"{path} ({size} bytes) is no readable file of torch.save, truncated or damaged: {what}."
    )
