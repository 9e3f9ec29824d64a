"""safetensors files: the header says where each tensor lies, and tensors are read one at a time.

The header is not read with the safetensors package, because the package needs a local file and an
object store offers byte ranges only. The same conditions are checked here. Those that protect the
memory come first: the length of the header must fit the size of the file.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError, one_line
from dynamics.formats.storage.files import contained, read_range, refuse_pointer, size_of
from dynamics.formats.storage.tensors import (
    CODE_BYTES,
    ITEM_BYTES,
    StoredTensor,
    checked_shape,
)

# The limit of the safetensors package.
_LONGEST_HEADER = 100_000_000
# Name of a dtype in safetensors -> its name in torch.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def safetensors_tensors(path: Path, root: Path) -> dict[str, StoredTensor]:
    """Stored name -> tensor of every tensor of a safetensors file.

    A dtype that is not known here keeps the name that it has in the file: "F4", "C64".

    Args:
        path: the file.
        root: the directory that it may not lead out of.

    Raises:
        FormatError: the file is missing, truncated or damaged.
    """
    contained(path, root)
    size = size_of(path)
    refuse_pointer(path, size)
    header, data_start = _header(path, size)
    tensors: dict[str, StoredTensor] = {}
    stretches: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = _offsets(path, name, entry, size - data_start)
        stretches.append((first, last))
        stored_dtype = str(entry.get("dtype"))[:40]
        dtype = _DTYPES.get(stored_dtype)
        shape = checked_shape(entry.get("shape"), f"{path}: {name}")
        if dtype is not None and prod(shape) * (ITEM_BYTES | CODE_BYTES)[dtype] != last - first:
            raise _damage_error(
                path, size, f"{name} is {dtype} {shape}, which does not take {last - first} bytes"
            )
        tensors[name] = StoredTensor(path, data_start + first, dtype or stored_dtype, shape)
    _check_covered(path, size, stretches, size - data_start)
    return tensors


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The strings that the writer of a safetensors file put into its header, by name.

    Raises:
        FormatError: the file is missing, truncated or damaged.
    """
    metadata = _header(path, size_of(path))[0].get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise _damage_error(path, size, "it has no header")
    length = int.from_bytes(read_range(path, 0, 8), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise _damage_error(path, size, f"its header would have {length} bytes")
    try:
        header = json.loads(read_range(path, 8, length).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damage_error(path, size, one_line(error)) from error
    if not isinstance(header, dict):
        raise _damage_error(path, size, f"its header is a JSON {type(header).__name__}")
    return header, 8 + length


def _offsets(path: Path, name: str, entry: Any, data_size: int) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    sound = (
        isinstance(offsets, list)
        and len(offsets) == 2
        and all(isinstance(each, int) for each in offsets)
        and 0 <= offsets[0] <= offsets[1] <= data_size
    )
    if not sound:
        raise _damage_error(
            path, data_size, f"{name} lies at {str(offsets)[:60]} of {data_size} bytes of data"
        )
    assert offsets is not None
    return offsets[0], offsets[1]


def _check_covered(path: Path, size: int, stretches: list[tuple[int, int]], end: int) -> None:
    at = 0
    for first, last in sorted(stretches):
        if first != at:
            raise _damage_error(path, size, f"its tensors leave a gap or overlap at byte {at}")
        at = last
    if at != end:
        raise _damage_error(path, size, f"its tensors end at {at} of {end} bytes of data")


def _damage_error(path: Path, size: int, what: str) -> FormatError:
    return FormatError(
        f"{path} ({size} bytes) is not a readable safetensors file; it is truncated or damaged: "
        f"{what}."
    )
