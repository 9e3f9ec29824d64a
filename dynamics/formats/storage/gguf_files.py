"""GGUF files: the header says which tensors there are, in which type, and where their bytes lie.

The header is read here and not with the gguf package, whose reader needs a local file, loads the
vocabulary, and trusts the counts that a file names. What bytes stand for is left to the package.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from dynamics.errors import FormatError
from dynamics.formats.storage.file_parts import open_part
from dynamics.formats.storage.files import contained, reporting_unreadable, size_of
from dynamics.formats.storage.tensors import StoredTensor, checked_shape

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Types of values in the header -> their format in `struct`.
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}
_LONGEST_NAME = 2**16
_MOST_DIMENSIONS = 4
# Type of a tensor -> (numbers, bytes) of a block: ggml's `type_traits`.
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F64": (1, 8),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
_TYPES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file.

    Attributes:
        type: its type in ggml: "F16", "Q4_K"; "type 99" for one that is not known.
        shape: of the numbers, rows before columns.
        data: its bytes, uint8 (..., bytes of a row); None where its type is not known.
    """

    type: str
    shape: tuple[int, ...]
    data: StoredTensor | None


def gguf_file(path: Path, root: Path) -> tuple[dict[str, GGUFTensor], dict[str, Any]]:
    """(Name -> tensor, name -> number or string of the header, without lists).

    Raises:
        FormatError: the file is missing, truncated or damaged, or of another version.
    """
    contained(path, root)
    size = size_of(path)
    with reporting_unreadable(path), open_part(path, 0, size) as file:
        header = _Header(path, size, file)
        if header.take(4) != _MAGIC:
            raise header.damage("it does not begin with GGUF")
        version, tensors, values = header.number("I"), header.number("Q"), header.number("Q")
        if version not in _VERSIONS:
            raise FormatError(
                f"{path} is GGUF of version {version}; known: {', '.join(map(str, _VERSIONS))}. "
                "It may be big-endian; convert it on a little-endian host."
            )
        said: dict[str, Any] = {}
        for _ in range(header.count(values)):
            name = header.string()
            said[name] = header.value(header.number("I"))
        found = [_described(header) for _ in range(header.count(tensors))]
        alignment = said.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment < 2**20:
            raise header.damage(f"an alignment of {str(alignment)[:40]}")
        begin = -(-file.tell() // alignment) * alignment
    return {
        name: _placed(header, name, type, shape, begin + offset)
        for name, type, shape, offset in found
    }, said


def _described(header: "_Header") -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = header.string(), header.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise header.damage(f"{name} has {dimensions} dimensions")
    sizes = [header.number("Q") for _ in range(dimensions)]  # the fastest first
    shape = checked_shape(sizes[::-1], f"{header.path}: {name}")
    return name, header.number("I"), shape, header.number("Q")


def _placed(
    header: "_Header", name: str, number: int, shape: tuple[int, ...], first: int
) -> GGUFTensor:
    type = _TYPES.get(number, f"type {number}")
    if type not in BLOCKS:
        return GGUFTensor(type, shape, None)
    numbers, size = BLOCKS[type]
    columns = shape[-1] if shape else 1
    if columns % numbers:
        raise header.damage(f"{name} has rows of {columns} in blocks of {numbers}")
    stored = (*(shape[:-1] or (1,)), columns // numbers * size)
    if first + prod(stored) > header.size:
        raise header.damage(f"{name} would end at byte {first + prod(stored)}")
    return GGUFTensor(type, shape, StoredTensor(header.path, first, "uint8", stored))


class _Header:
    """Reads a header from its beginning; nothing beyond the end of the file is asked for."""

    def __init__(self, path: Path, size: int, file: BinaryIO):
        self.path, self.size, self._file = path, size, file

    def damage(self, what: str) -> FormatError:
        """The error for a header that cannot be right."""
        return FormatError(
            f"{self.path} ({self.size} bytes) is not a readable GGUF file; it is truncated or "
            f"damaged: {what}."
        )

    def take(self, length: int) -> bytes:
        """The next bytes."""
        if length > self.size - self._file.tell():
            raise self.damage(f"its header asks for {length} bytes at {self._file.tell()}")
        return self._file.read(length)

    def number(self, format: str) -> Any:
        """The next number."""
        return struct.unpack("<" + format, self.take(struct.calcsize("<" + format)))[0]

    def count(self, items: int) -> int:
        """How many items follow, after a check that there is room for as many."""
        if items > self.size:
            raise self.damage(f"its header would have {items} items")
        return items

    def string(self) -> str:
        """The next string."""
        length = self.number("Q")
        if length > _LONGEST_NAME:
            raise self.damage(f"a name of {length} bytes")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, type: int) -> Any:
        """The next value of the header; None in the place of lists and of long strings."""
        if type in _SCALARS:
            return self.number(_SCALARS[type])
        if type == _STRING:
            length = self.number("Q")
            return self.take(length)[:200].decode("utf-8", errors="replace")
        if type != _ARRAY:
            raise self.damage(f"a value of type {type}")
        inner, items = self.number("I"), self.count(self.number("Q"))
        if inner in _SCALARS:
            self.take(items * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(items):
                self.take(self.number("Q"))
        else:
            raise self.damage(f"a list of type {inner}")
        return None
