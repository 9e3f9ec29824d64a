"""The flat float32 partitions of DeepSpeed's ZeRO, cut into parameters.

The arithmetic is that of deepspeed/utils/zero_to_fp32.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.storage.tensors import AssembledTensor, StoredTensor, Tensor


def zero2_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    partitions: list[StoredTensor],
    paddings: Sequence[int] | None,
    directory: Path,
) -> dict[str, Tensor]:
    """Stages 1 and 2: the partitions of all ranks, joined, are the parameters of a group, joined.

    Args:
        shapes: name -> shape of the parameters of one group, in its order.
        partitions: of the group, by rank.
        paddings: count of unused numbers after each parameter; None where there are none.
        directory: for messages.

    Raises:
        FormatError: partitions and shapes disagree.
    """
    whole = JoinedTensors(partitions)
    parameters: dict[str, Tensor] = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings or [0] * len(shapes), strict=True):
        parameters[name] = whole.cut(at, shape, directory)
        at += prod(shape) + padding
    aligned = 2 * len(partitions)  # the end is padded to this, in some releases
    if ceil(at / aligned) != ceil(whole.numbers / aligned):
        raise _sizes_error(directory, at, whole.numbers)
    return parameters


def zero3_parameters(
    shapes: Mapping[str, tuple[int, ...]], flat: list[list[StoredTensor]], directory: Path
) -> dict[str, Tensor]:
    """Stage 3: each parameter is cut into equal parts, one per rank; the last part is padded.

    The groups of a rank, joined, are its parts of all parameters, joined.

    Args:
        shapes: name -> shape of the parameters of all groups, in their order.
        flat: the groups of each rank, by rank.
        directory: for messages.

    Raises:
        FormatError: partitions and shapes disagree.
    """
    ranks = [JoinedTensors(groups) for groups in flat]
    parameters: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        numbers = prod(shape)
        part = ceil(numbers / len(ranks))
        pieces: list[tuple[int, StoredTensor]] = []
        for rank, joined in enumerate(ranks):
            held = min(part, max(numbers - rank * part, 0))
            pieces += [
                (rank * part + offset, piece)
                for offset, piece in joined.pieces(at, held, directory)
            ]
        parameters[name] = _joined(shape, pieces)
        at += part
    for joined in ranks:
        if joined.numbers != at:
            raise _sizes_error(directory, at, joined.numbers)
    return parameters


@dataclass(frozen=True)
class JoinedTensors:
    """Flat tensors, joined into one long flat tensor without copying."""

    parts: Sequence[StoredTensor]

    @property
    def numbers(self) -> int:
        """Count of numbers in all parts."""
        return sum(prod(part.shape) for part in self.parts)

    def pieces(
        self, first: int, numbers: int, directory: Path
    ) -> Iterable[tuple[int, StoredTensor]]:
        """(offset, piece) of the pieces that make up the `numbers` from `first` on."""
        if first + numbers > self.numbers:
            raise _sizes_error(directory, first + numbers, self.numbers)
        begins = accumulate((prod(part.shape) for part in self.parts), initial=0)
        for begin, part in zip(begins, self.parts, strict=False):
            start, end = max(first, begin), min(first + numbers, begin + prod(part.shape))
            if start < end:
                yield start - first, part.part(start - begin, (end - start,))

    def cut(self, first: int, shape: tuple[int, ...], directory: Path) -> Tensor:
        """The tensor of `shape` that begins at number `first`."""
        return _joined(shape, list(self.pieces(first, prod(shape), directory)))


def _joined(shape: tuple[int, ...], pieces: Sequence[tuple[int, StoredTensor]]) -> Tensor:
    if len(pieces) == 1:
        return pieces[0][1].part(0, shape)
    dtype = pieces[0][1].dtype if pieces else "float32"
    placed = [((slice(at, at + prod(piece.shape)),), piece) for at, piece in pieces]
    return AssembledTensor(shape, dtype, tuple(placed), flat=True)


def flat_tensor(value: Any, directory: Path) -> StoredTensor:
    """The value, after a check that it is a tensor of which parts can be read.

    Raises:
        FormatError: it is not.
    """
    if not isinstance(value, StoredTensor) or value.strides is not None:
        raise FormatError(
            f"{directory} holds a partition that is not a plain tensor; "
            "convert it with its zero_to_fp32.py."
        )
    return value


def _sizes_error(directory: Path, wanted: int, stored: int) -> FormatError:
    return FormatError(
        f"{directory} holds {stored} numbers in its partitions, but its parameters take {wanted}; "
        "files of different saves lie there together, or one is damaged."
    )
