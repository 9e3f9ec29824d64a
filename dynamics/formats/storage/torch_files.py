"""Files of torch.save, zipped or in the form before torch 1.6, read without unpickling objects.

`torch_file(path, root)` returns what was saved, with a StoredTensor in place of each tensor. The
pickle says which dtype and shape a tensor has, and where in the file its numbers lie. They are read
one tensor at a time, from a disk or by byte ranges. Nothing that a file names is run: see
`unpickling`.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

from dynamics.errors import FormatError
from dynamics.formats.storage.file_parts import BoundedFile, open_part
from dynamics.formats.storage.files import (
    contained,
    is_at_hand,
    one_line,
    read_range,
    refuse_pointer,
    size_of,
)
from dynamics.formats.storage.tensors import (
    CODE_BYTES,
    ITEM_BYTES,
    StoredTensor,
    Tensor,
    UnreadTensor,
    checked_shape,
)
from dynamics.formats.storage.unpickling import Inert, TensorUnpickler, callable_from_files

# More than the pickle of any state dict has: tensors lie outside of the pickle.
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
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
}
# Bytes of what is never read, and why.
_UNREAD_BYTES = {"complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4}
_COMPLEX, _TORCH_QUANTISED = "complex numbers", "quantised by torch, not dequantised"
# torch's functions that rebuild what has no plain storage -> why it is not read.
_REBUILDERS = {
    "_rebuild_meta_tensor_no_storage": "meta tensors, which have no numbers",
    "_rebuild_sparse_tensor": "sparse tensors",
    "_rebuild_qtensor": _TORCH_QUANTISED,
    "_rebuild_nested_tensor": "nested tensors",
    "_rebuild_wrapper_subclass": "tensors of a class that is not made",
}


@dataclass(frozen=True)
class _Region:
    """One storage of torch: a range of bytes of the file."""

    key: str
    dtype: str | None  # None: a dtype that is not known here
    bytes: int


def torch_file(path: Path, root: Path, first: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote, with a StoredTensor for each tensor and an Inert for other objects.

    Args:
        path: the file.
        root: the directory that it may not lead out of.
        first: the byte where it begins, for a file of torch.save inside another file.
        length: its size in bytes there; by default to the end of the file.

    Raises:
        FormatError: the file is missing, truncated or damaged, or torch.save did not write it.
    """
    contained(path, root)
    size = size_of(path)
    if first == 0:
        refuse_pointer(path, size)
    length = size - first if length is None else length
    if first < 0 or length < 0 or first + length > size:
        raise _damage_error(path, size, f"it does not have {length} bytes at {first}")
    try:
        with open_part(path, first, length) as file:
            if zipfile.is_zipfile(file):
                return _read_zip(path, file, first, length)
            file.seek(0)
            return _read_legacy(path, cast(BinaryIO, BoundedFile(file, length)), first, length)
    except FormatError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise _damage_error(path, size, what) from error


def tensors_of(saved: Any, where: str) -> dict[str, Tensor]:
    """Name -> tensor of a (nested) mapping that `torch_file` gave.

    The keys of nested mappings are joined with dots. Values that are no tensors are left out.
    A tensor that cannot be read (complex, sparse, of an unknown class) is an `UnreadTensor`.

    Raises:
        FormatError: it is not a mapping, or has no tensor that can be read.
    """
    tensors: dict[str, Tensor] = {}
    for position, (name, value) in enumerate(_leaves(saved, "")):
        if position == _MOST_NAMES:  # a file may name one mapping many times, at many levels
            raise FormatError(f"{where} holds over {_MOST_NAMES} names; it is not a state dict.")
        if isinstance(value, StoredTensor | UnreadTensor):
            tensors[name] = value
    if not any(each.dtype in ITEM_BYTES for each in tensors.values()):
        for name, tensor in tensors.items():
            if isinstance(tensor, UnreadTensor):
                raise FormatError(f"{where} holds none that is read: {name} is {tensor.reason}.")
        raise FormatError(f"{where} holds no tensors by name{_class_needed(saved)}.")
    return tensors


def _leaves(value: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth < 32:
        for key, each in value.items():
            yield from _leaves(each, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    else:
        yield prefix, value


def _class_needed(saved: Any) -> str:
    if isinstance(saved, Inert):
        return f": it is an object of {saved.name}, and such objects are not made; save a dict"
    return ""


def _read_zip(path: Path, file: BinaryIO, first: int, length: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {each.filename: each for each in archive.infolist()}
        pickled = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickled) != 1:
            raise _damage_error(path, length, f"a zip archive with {len(pickled)} data.pkl")
        stem = pickled[0].removesuffix("data.pkl")
        for member in members.values():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > length:
                raise _damage_error(path, length, f"its member {member.filename!r} is compressed")
        order = members.get(stem + "byteorder")
        if order is not None and order.file_size < 16 and archive.read(order) != b"little":
            raise FormatError(f"{path} holds big-endian numbers; save it on a little-endian host.")
        if members[pickled[0]].file_size > _LONGEST_PICKLE:
            raise _damage_error(
                path, length, f"its pickle has {members[pickled[0]].file_size} bytes"
            )
        data = archive.read(members[pickled[0]])
        begins = sorted(each.header_offset for each in members.values())
        following = dict(zip(begins, [*begins[1:], archive.start_dir], strict=True))

    def offset_of(region: _Region) -> int:
        member = members.get(f"{stem}data/{region.key}")
        if member is None or region.bytes > member.file_size:
            raise _damage_error(path, length, f"storage {region.key!r} is missing or too short")
        start = None
        if not is_at_hand(path, first + member.header_offset, 30):
            start = _aligned_start(member, following[member.header_offset])
        if start is None:
            # Lengths in a local header may differ from those in the directory of the archive.
            local = read_range(path, first + member.header_offset, 30)
            if local[:4] != b"PK\x03\x04":
                what = f"storage {region.key!r} is not where it should be"
                raise _damage_error(path, length, what)
            names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            start = member.header_offset + 30 + names
        if start + region.bytes > length:
            raise _damage_error(path, length, f"storage {region.key!r} ends beyond the file")
        return first + start

    return _TensorPlacer(path, offset_of).load(io.BytesIO(data), _storage)


def _aligned_start(member: zipfile.ZipInfo, following: int) -> int | None:
    """Where the bytes of a member begin, told without a request; None where it is not certain.

    torch begins them at the next multiple of 64, behind a header of known length. The next member
    must then follow them at once, or after a descriptor.

    Args:
        member: a member of the archive.
        following: where the next member begins, or the directory.
    """
    header = member.header_offset + 30 + len(member.filename.encode()) + 4
    starts = {-(-(header + large) // 64) * 64 for large in (0, 20)}
    ends = {following - member.file_size - descriptor for descriptor in (0, 16, 24)}
    both = starts & ends
    return both.pop() if len(both) == 1 else None


def _read_legacy(path: Path, file: BinaryIO, first: int, length: int) -> Any:
    """The form before torch 1.6: five pickles in a row, then the storages in the order of keys."""
    if _read_plain_pickle(file) != _LEGACY_MAGIC:
        raise _damage_error(path, length, "torch.save did not write it")
    _read_plain_pickle(file), _read_plain_pickle(file)  # protocol version, system information
    body_at = file.tell()
    regions: dict[str, _Region] = {}

    def storage(pid: Any) -> _Region:
        region = _storage(pid)
        regions[region.key] = region
        return region

    # The storages follow the pickle. The first reading finds its end, the second places tensors.
    _TensorPlacer(path, lambda region: 0).load(file, storage)
    keys = _read_plain_pickle(file)
    starts, at = {}, file.tell()
    for key in keys:
        region = regions[str(key)]
        if int.from_bytes(read_range(path, first + at, 8), "little") * _item(region) < region.bytes:
            raise _damage_error(path, length, f"storage {key!r} is too short")
        starts[region.key] = first + at + 8
        at += 8 + region.bytes
    if at > length:
        raise _damage_error(path, length, f"its storages end at {at}")
    file.seek(body_at)
    return _TensorPlacer(path, lambda region: starts[region.key]).load(file, _storage)


def _read_plain_pickle(file: BinaryIO) -> Any:
    def no_storage(_: Any) -> Any:
        raise pickle.UnpicklingError("a tensor where none belongs")

    return TensorUnpickler(cast(io.BufferedIOBase, file), lambda *_: None, no_storage).load()


def _storage(pid: Any) -> _Region:
    kind, storage_type, key, _, numbers = pid[:5]
    dtype = storage_type if isinstance(storage_type, str) else None
    if kind != "storage" or not isinstance(numbers, int) or not 0 <= numbers < 2**48:
        raise pickle.UnpicklingError(f"a storage of {str(numbers)[:40]} numbers")
    return _Region(str(key), dtype, numbers * _bytes(dtype or "uint8"))


def _bytes(dtype: str) -> int:
    return (ITEM_BYTES | CODE_BYTES | _UNREAD_BYTES)[dtype]


def _item(region: _Region) -> int:
    return _bytes(region.dtype or "uint8")


class _TensorPlacer:
    """Stand-ins for torch's rebuilding functions: they note where in a file a tensor lies."""

    def __init__(self, path: Path, offset_of: Any):
        self._path = path
        self._offset_of = offset_of
        self._rebuilders = {
            "_rebuild_tensor": callable_from_files(lambda *args: self._tensor(*args)),
            "_rebuild_tensor_v2": callable_from_files(lambda *args: self._tensor(*args)),
            "_rebuild_tensor_v3": callable_from_files(lambda *args: self._tensor_of_dtype(*args)),
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
        if module == "torch" and (name in ITEM_BYTES or name in CODE_BYTES):
            return name  # a dtype
        if (module, name) == ("torch", "Size"):
            return callable_from_files(lambda sizes=(): tuple(sizes))
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return callable_from_files(_of_subclass)
        if name.startswith("_rebuild_"):
            return callable_from_files(partial(_unread, f"{module}.{name}"))
        return None

    def _tensor_of_dtype(
        self, storage: Any, first: int, shape: Any, strides: Any, *rest: Any
    ) -> Any:
        dtype = rest[2] if len(rest) > 2 else None
        if isinstance(dtype, Inert):
            sizes = checked_shape(shape, str(self._path))
            return UnreadTensor(sizes, f"numbers of the dtype {dtype.name.removeprefix('torch.')}")
        return self._tensor(storage, first, shape, strides, *rest[:2], *rest[3:], dtype=dtype)

    def _tensor(
        self,
        storage: Any,
        first: Any,
        shape: Any,
        strides: Any,
        _requires_grad: Any = None,
        _hooks: Any = None,
        metadata: Any = None,
        *,
        dtype: str | None = None,
    ) -> StoredTensor | UnreadTensor:
        sizes = checked_shape(shape, str(self._path))
        if not isinstance(storage, _Region):
            return UnreadTensor(sizes, "tensors without storage of their own")
        dtype = dtype or storage.dtype
        if dtype is None:
            return UnreadTensor(sizes, "numbers of an unknown type")
        if dtype in _UNREAD_BYTES:
            reason = _COMPLEX if dtype.startswith("complex") else _TORCH_QUANTISED
            return UnreadTensor(sizes, reason, dtype)
        steps = checked_shape(strides, f"{self._path}: storage {storage.key!r}")
        if len(sizes) != len(steps) or not isinstance(first, int) or first < 0:
            raise pickle.UnpicklingError(f"a tensor at {first!r} with strides {steps}")
        contiguous = _contiguous(sizes, steps)
        tensor = StoredTensor(
            self._path,
            self._offset_of(storage) + first * _bytes(dtype),
            dtype,
            sizes,
            None if contiguous else steps,
            negated=isinstance(metadata, Mapping) and metadata.get("neg") is True,
        )
        if (first + tensor.extent) * _bytes(dtype) > storage.bytes:
            raise pickle.UnpicklingError(
                f"a tensor of shape {sizes} in a storage of {storage.bytes} bytes"
            )
        # A view that repeats numbers (an expanded tensor) takes more memory than its file.
        if dtype in ITEM_BYTES and prod(sizes) > 2 * max(tensor.extent, 1):
            return UnreadTensor(sizes, "tensors that repeat a few numbers (expanded)")
        return tensor


def _of_subclass(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """The plain tensor of a tensor subclass, where it was saved as one."""
    rebuilt = function(*args) if getattr(function, "may_be_called", False) else None
    if isinstance(rebuilt, StoredTensor):
        return rebuilt
    name = getattr(kind, "name", "an unknown class")
    return UnreadTensor(getattr(rebuilt, "shape", ()), f"tensors of the class {name}")


def _unread(function: str, *args: Any) -> UnreadTensor:
    """What stands for a tensor that one of torch's other functions would rebuild."""
    reason = _REBUILDERS.get(function.rpartition(".")[2], f"tensors that need {function}")
    nested = [each for arg in args for each in (arg if isinstance(arg, tuple) else ())]
    shapes = (each for each in (*args, *nested) if _is_shape(each))  # strides come after it
    return UnreadTensor(checked_shape(next(shapes, ()), function), reason)


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(n, int) for n in value)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= max(size, 1)
    return True


def _damage_error(path: Path, size: int, what: str) -> FormatError:
    return FormatError(
        f"{path} ({size} bytes) is not a readable file of torch.save; it is truncated or damaged: "
        f"{what}."
    )
