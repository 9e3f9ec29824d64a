"""What is known of the errors of a quantised matrix: its codes, and the scale of each group."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class CodeErrors:
    """The rounding errors of the entries of a matrix that is stored as codes times scales.

    A code stands for all the numbers that are nearer to its value than to those of its neighbours.
    An error is taken as uniform in this interval. Errors can be indexed, taken from and transposed
    like the array of the values.

    Attributes:
        scale: (groups of rows, groups of columns) float64, what the values of codes are multiplied
            with. One more axis for each further axis of the values.
        groups: for each axis the group of each index, (size,) integers.
        variances: (k,) float64, of the errors of each code, in units of the squared scale.
        widths: (k,) float64, the largest error of each code, in units of the scale.
        codes: uint8, the shape of the values; None where all codes have the same errors.

    Example:
        >>> from dynamics.runs.code_errors import CodeErrors, interval_errors
        >>> every = np.zeros(2, dtype=np.int64)
        >>> errors = CodeErrors(np.full((1, 1), 0.5), (every, every), *interval_errors(None))
        >>> (errors.variance() * 12).tolist()  # the square of the distance of two codes
        [[0.25, 0.25], [0.25, 0.25]]
    """

    scale: np.ndarray
    groups: tuple[np.ndarray, ...]
    variances: np.ndarray
    widths: np.ndarray
    codes: np.ndarray | None = None

    def variance(self, rows: slice = slice(None)) -> np.ndarray:
        """The mean square of the error of each entry in these rows, float64."""
        return self._each(self.variances, rows) * np.square(self._scales(rows))

    def spacing(self) -> np.ndarray:
        """Twice the largest error of each entry, float64."""
        return self._each(2 * self.widths, slice(None)) * np.abs(self._scales(slice(None)))

    def scaled(self, factor: float) -> "CodeErrors":
        """The errors of the matrix times a factor."""
        return replace(self, scale=self.scale * factor)

    @property
    def T(self) -> "CodeErrors":
        """Of the transposed matrix."""
        codes = None if self.codes is None else self.codes.T
        return replace(self, scale=self.scale.T, groups=self.groups[::-1], codes=codes)

    def take(self, index: np.ndarray, axis: int) -> "CodeErrors":
        """Of the rows (axis 0) or columns (axis 1) with these indices."""
        groups = tuple(
            each.take(index) if at == axis else each for at, each in enumerate(self.groups)
        )
        codes = None if self.codes is None else self.codes.take(index, axis=axis)
        return replace(self, groups=groups, codes=codes)

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> "CodeErrors":
        """Of a part: an integer drops its axis, a slice keeps it."""
        given = index if isinstance(index, tuple) else (index,)
        given = (*given, *(slice(None),) * (len(self.groups) - len(given)))
        scale, groups = self.scale, []
        for axis in reversed(range(len(given))):
            at, group = given[axis], self.groups[axis]
            if isinstance(at, slice):
                groups.append(group[at])
            else:
                scale = scale.take(int(group[at]), axis=axis)
        codes = None if self.codes is None else self.codes[given]
        return replace(self, scale=scale, groups=tuple(reversed(groups)), codes=codes)

    def are_of(self, other: "CodeErrors | None") -> bool:
        """Whether both are the errors of one stored matrix, which cancel in a difference."""
        if other is None or self.codes is None or other.codes is None:
            return False
        pairs = zip(
            (self.scale, self.codes, self.variances, *self.groups),
            (other.scale, other.codes, other.variances, *other.groups),
            strict=False,
        )
        return all(one is two or np.array_equal(one, two) for one, two in pairs)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What they are made of, besides the codes, which follow from values and scales."""
        return (self.scale, self.variances, *self.groups)

    def _each(self, of_codes: np.ndarray, rows: slice) -> Any:
        return of_codes[0] if self.codes is None else of_codes[self.codes[rows]]

    def _scales(self, rows: slice) -> np.ndarray:
        return expanded(self.scale, (self.groups[0][rows], *self.groups[1:]))


def interval_errors(book: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(Variance, largest size) of the error of each code, in units of the scale.

    The interval of a code reaches to the midpoints towards its neighbours, l below and h above, and
    an error that is uniform in it has the mean square (h³ + l³) / (3(h + l)). The outermost codes
    reach as far outwards as inwards.

    Args:
        book: (k,) the value of each code; the order is free, values may repeat, and codes without a
            finite value have no error. None: all integers.

    Returns:
        (k,) and (k,) float64, k = 1 for integers.

    Example:
        >>> variances, widths = interval_errors(np.array([1.0, 0.0, 2.0, 4.0]))
        >>> (variances * 12).tolist(), widths.tolist()  # 2 is as near to 1.5 as to 3
        ([1.0, 1.0, 3.0, 4.0], [0.5, 0.5, 1.0, 1.0])
    """
    if book is None:
        return np.array([1 / 12]), np.array([0.5])
    finite = np.isfinite(book)
    values, place = np.unique(book[finite].astype(np.float64), return_inverse=True)
    half = np.diff(values) / 2 if values.size > 1 else np.zeros(1)
    above, below = np.append(half, half[-1])[place], np.insert(half, 0, half[0])[place]
    variances, widths = np.zeros(book.size), np.zeros(book.size)
    total = np.where(above + below > 0, above + below, 1.0)
    variances[finite] = (above**3 + below**3) / (3 * total)
    widths[finite] = np.maximum(above, below)
    return variances, widths


def expanded(scale: np.ndarray, groups: tuple[np.ndarray, ...]) -> np.ndarray:
    """The number of `scale` that belongs to each entry, by the groups along each axis."""
    for axis in range(len(groups)):  # the rows first: often they are a block of all rows
        if scale.shape[axis] > 1 or groups[axis].size != 1:
            scale = scale.take(groups[axis], axis=axis)
    return scale
