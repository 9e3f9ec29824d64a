"""Tensors in files: where their bytes lie, read one at a time."""

from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.files import origin_of, read_range

# torch's name of a dtype that weights are stored in -> bytes per number. Integers are no weights to
# measure, but codes of quantised weights or indices.
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
# Likewise, for what quantised weights are made of, and for indices.
CODE_BYTES = {
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
_STORED_BYTES = ITEM_BYTES | CODE_BYTES
_NATIVE = ("float64", "float32", "float16")
_INTEGERS = tuple(dtype for dtype in CODE_BYTES if not dtype.startswith("float"))


class Tensor(Protocol):
    """A tensor of a checkpoint that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """The dtype it is stored in, torch's name: "bfloat16"."""

    @property
    def origin(self) -> str | None:
        """A cheap token that changes when its content may have changed; None: not known."""

    @property
    def place(self) -> object:
        """Where it lies: two names with equal places stand for one tensor."""

    def read(self) -> np.ndarray:
        """Its numbers, in a NumPy dtype that represents them exactly.

        Raises:
            FormatError: its file is damaged or missing.
        """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes lie in one file.

    Attributes:
        path: the file.
        offset: of its first number, in bytes from the beginning of the file.
        dtype: torch's name.
        shape: its shape.
        strides: counted in numbers; None for a contiguous tensor. Not None for example for a
            transposed tensor in a torch file.
        negated: whether the file holds the negatives of the numbers, as for torch's negative views.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    negated: bool = False

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        sign = ("negated",) * self.negated
        return (str(self.path), self.offset, self.dtype, self.shape, self.strides, *sign)

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`."""
        file = origin_of(self.path)
        sign = "|negated" * self.negated
        return file and f"{file}|{self.offset}|{self.dtype}|{self.shape}|{self.strides}{sign}"

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in the file."""
        return _STORED_BYTES[self.dtype]

    @property
    def extent(self) -> int:
        """Count of numbers in the file from the first of the tensor to its last."""
        if self.strides is None or 0 in self.shape:
            return prod(self.shape)
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def read(self) -> np.ndarray:
        """See `Tensor.read`."""
        raw = read_range(self.path, self.offset, self.extent * self.item_bytes)
        flat = decoded(raw, self.dtype)
        flat = -flat if self.negated else flat
        if self.strides is None or 0 in self.shape:
            return flat.reshape(self.shape)
        strides = tuple(stride * flat.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides)

    def part(self, first: int, shape: tuple[int, ...]) -> "StoredTensor":
        """The part of this contiguous tensor that begins at number `first` and has `shape`."""
        assert self.strides is None
        assert first + prod(shape) <= prod(self.shape)
        offset = self.offset + first * self.item_bytes
        return StoredTensor(self.path, offset, self.dtype, shape, negated=self.negated)


@dataclass(frozen=True, eq=False)
class UnreadTensor:
    """A tensor that is stored, and whose numbers are not read.

    Attributes:
        shape: its shape.
        reason: what it is, in a few words that others of its kind share: "complex numbers".
        dtype: torch's name where it is known.
    """

    shape: tuple[int, ...]
    reason: str
    dtype: str = "unread"

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return id(self)

    @property
    def origin(self) -> None:
        """See `Tensor.origin`."""
        return None

    def read(self) -> np.ndarray:
        """Not possible.

        Raises:
            FormatError: always.
        """
        raise FormatError(f"A tensor of shape {self.shape} is not read: {self.reason}.")


@dataclass(frozen=True)
class AssembledTensor:
    """A tensor in several pieces: shards of a distributed checkpoint.

    Attributes:
        shape: of the whole.
        dtype: torch's name, the same for all pieces.
        pieces: (slices of the whole that the piece fills, the piece). Together the pieces cover the
            whole. With `flat`, the slices are those of the flattened whole.
        flat: whether the pieces are parts of the flattened tensor.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[tuple[slice, ...], Tensor], ...]
    flat: bool = False

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return tuple(piece.place for _, piece in self.pieces)

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`."""
        origins = [piece.origin for _, piece in self.pieces]
        return None if None in origins else "\n".join(str(each) for each in origins)

    def read(self) -> np.ndarray:
        """See `Tensor.read`."""
        native = self.dtype if self.dtype in (*_NATIVE, *_INTEGERS) else "float32"
        whole = np.empty(prod(self.shape) if self.flat else self.shape, dtype=native)
        for where, piece in self.pieces:
            whole[where] = piece.read()
        return whole.reshape(self.shape)


def decoded(raw: bytes, dtype: str) -> np.ndarray:
    """Little-endian numbers as a flat array; bfloat16 and 8-bit floats become float32, exactly."""
    if dtype in (*_NATIVE, *_INTEGERS):
        return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<"))
    if dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return float8_values(dtype)[np.frombuffer(raw, np.uint8)]


@cache
def float8_values(dtype: str) -> np.ndarray:
    """The value of each of the 256 codes of an 8-bit float, float32.

    Example:
        >>> float8_values("float8_e4m3fn")[[0x38, 0x7E, 0xB8]]
        array([  1., 448.,  -1.], dtype=float32)
    """
    codes = np.arange(256)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "float8_e8m0fnu":
        return np.where(codes == 255, np.nan, np.exp2(codes - 127.0)).astype(np.float32)
    exponent, significand = codes >> 3 & 15, codes & 7
    size = np.where(
        exponent == 0,
        np.ldexp(significand / 8, -6),
        np.ldexp(1 + significand / 8, exponent - 7),
    )
    size[codes & 127 == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)


def checked_shape(shape: object, where: str) -> tuple[int, ...]:
    """A shape from the metadata of a file, after a check that it is one.

    Raises:
        FormatError: it is not a list of non-negative integers, or larger than any memory.
    """
    if not isinstance(shape, list | tuple) or not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in shape
    ):
        raise FormatError(f"{where} has shape {str(shape)[:80]}, expected a list of sizes.")
    if prod(shape) >= 2**48:
        raise FormatError(f"{where} has the absurd shape {str(tuple(shape))[:80]}; it is damaged.")
    return tuple(shape)
