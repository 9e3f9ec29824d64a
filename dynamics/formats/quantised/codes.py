"""Codes and their scales, read from files: the values that they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from dynamics.runs.code_errors import CodeErrors, expanded, interval_errors

_BLOCK = 2**18  # entries worked on at a time
# E2M1, the four-bit float of MXFP4 and NVFP4; bit 3 is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True, eq=False)
class Codes:
    """(book[codes] - zero) · scale, with one scale and one zero point per group of entries.

    Attributes:
        codes: uint8, the shape of the tensor.
        book: (k,) float32, the value of each code.
        scale: float64, with one axis per axis of the tensor.
        groups: for each axis the group of each index, (size,) integers.
        zero: like `scale`; None where zero is zero.
    """

    codes: np.ndarray
    book: np.ndarray
    scale: np.ndarray
    groups: tuple[np.ndarray, ...]
    zero: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """The numbers, float32: exact, and rounded once where they do not fit."""
        result = np.empty(self.codes.shape, dtype=np.float32)
        book = self.book.astype(np.float64)
        height = max(1, _BLOCK // max(self.codes[:1].size, 1))
        with np.errstate(over="ignore", invalid="ignore"):  # non-finite numbers are told later
            for first in range(0, len(self.codes), height):
                rows = slice(first, first + height)
                groups = (self.groups[0][rows], *self.groups[1:])
                block = book[self.codes[rows]]
                if self.zero is not None:
                    block -= expanded(self.zero, groups)
                block *= expanded(self.scale, groups)
                result[rows] = block
        return result

    def errors(self) -> CodeErrors:
        """What is known of the errors of the numbers."""
        variances, widths = interval_errors(self.book)
        return CodeErrors(self.scale, self.groups, variances, widths, self.codes)

    def transposed(self) -> "Codes":
        """With the last two axes exchanged."""
        swap = lambda array: None if array is None else array.swapaxes(-1, -2)  # noqa: E731
        *leading, rows, cols = self.groups
        return replace(
            self,
            codes=self.codes.swapaxes(-1, -2),
            scale=self.scale.swapaxes(-1, -2),
            zero=swap(self.zero),
            groups=(*leading, cols, rows),
        )

    def part(self, index: tuple[int | slice, ...]) -> "Codes":
        """A part; an integer drops its axis."""
        errors = self.errors()[index]
        zero = self.zero
        if zero is not None:
            zero = CodeErrors(zero, self.groups, *interval_errors(None))[index].scale
        assert errors.codes is not None
        return Codes(errors.codes, self.book, errors.scale, errors.groups, zero)


def blocks(shape: Sequence[int], block: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The groups of blocks of this size along each axis; the last block of an axis may be smaller.

    Example:
        >>> blocks((1, 5), (1, 2))
        (array([0]), array([0, 0, 1, 1, 2]))
    """
    return tuple(
        np.arange(size) // max(length, 1) for size, length in zip(shape, block, strict=True)
    )


@cache
def signed_book() -> np.ndarray:
    """The values of the bytes of int8."""
    return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


@cache
def integer_book(bits: int) -> np.ndarray:
    """The values of unsigned integers."""
    return np.arange(2**bits, dtype=np.float32)


def powers_of_two(exponents: np.ndarray) -> np.ndarray:
    """2^(e - 127) of the bytes of E8M0, float64; 255 is NaN."""
    scale = np.exp2(exponents.astype(np.float64) - 127)
    return np.where(exponents == 255, np.nan, scale)


def nibbles(packed: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """The two codes of each byte, along the last axis, which doubles."""
    low, high = packed & 15, packed >> 4
    pair = (high, low) if high_first else (low, high)
    return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def unpacked(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` codes of `bits` bits each, from a stream of bits along the last axis.

    The lowest bits of a word come first, and codes may continue in the next word.

    Args:
        words: (..., w) int32.
        bits: 1 to 8.
        count: of the codes in each row.

    Returns:
        (..., count) uint8.

    Example:
        >>> unpacked(np.array([[0x21, 0x43]], dtype=np.int32), 4, 10)
        array([[1, 2, 0, 0, 0, 0, 0, 0, 3, 4]], dtype=uint8)
    """
    flat = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    groups = -(-count // 8)  # eight codes lie in `bits` bytes
    missing = groups * bits - flat.shape[-1]
    if missing > 0:
        flat = np.concatenate([flat, np.zeros((*flat.shape[:-1], missing), np.uint8)], axis=-1)
    flat = flat[..., : groups * bits].reshape(*flat.shape[:-1], groups, bits)
    codes = np.empty((*flat.shape[:-1], 8), np.uint8)
    for at in range(8):
        byte, shift = divmod(at * bits, 8)
        code = flat[..., byte] >> shift
        if shift + bits > 8:
            code = code | (flat[..., byte + 1] << (8 - shift))
        codes[..., at] = code & (2**bits - 1)
    return codes.reshape(*flat.shape[:-2], 8 * groups)[..., :count]
