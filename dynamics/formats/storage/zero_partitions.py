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
    """Stages 1 and 2: the ranks' partitions end to end are the parameters end to end.

    Args:
        shapes: of the parameters of one group, in its order.
        partitions: of the group, by rank.
        paddings: numbers behind each parameter that belong to none, None where there are none.
        directory: for messages.

    Raises:
        FormatError: partitions and shapes disagree.
    """
    whole = Stretches(partitions)
    found: dict[str, Tensor] = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings or [0] * len(shapes), strict=True):
        found[name] = whole.cut(at, shape, directory)
        at += prod(shape) + padding
    aligned = 2 * len(partitions)  # the end is padded to this, in some releases
    if ceil(at / aligned) != ceil(whole.numbers / aligned):
        raise _disagree(directory, at, whole.numbers)
    return found


def zero3_parameters(
    shapes: Mapping[str, tuple[int, ...]], flat: list[list[StoredTensor]], directory: Path
) -> dict[str, Tensor]:
    """Stage 3: each parameter is cut into as many equal parts as there are ranks, the last padded.

    A rank's groups end to end are its parts of all parameters end to end.

    Args:
        shapes: of the parameters of all groups, in their order.
        flat: by rank, its groups.
        directory: for messages.

    Raises:
        FormatError: partitions and shapes disagree.
    """
    ranks = [Stretches(groups) for groups in flat]
    found: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        numbers = prod(shape)
        part = ceil(numbers / len(ranks))
        pieces: list[tuple[int, StoredTensor]] = []
        for rank, stretches in enumerate(ranks):
            held = min(part, max(numbers - rank * part, 0))
            pieces += [
                (rank * part + offset, piece)
                for offset, piece in stretches.pieces(at, held, directory)
            ]
        found[name] = _joined(shape, pieces)
        at += part
    for stretches in ranks:
        if stretches.numbers != at:
            raise _disagree(directory, at, stretches.numbers)
    return found


@dataclass(frozen=True)
class Stretches:
    """Flat tensors end to end."""

    parts: Sequence[StoredTensor]

    @property
    def numbers(self) -> int:
        """How many there are."""
        return sum(prod(part.shape) for part in self.parts)

    def pieces(
        self, first: int, numbers: int, directory: Path
    ) -> Iterable[tuple[int, StoredTensor]]:
        """(offset in the stretch, piece) of the `numbers` that begin at `first`."""
        if first + numbers > self.numbers:
            raise _disagree(directory, first + numbers, self.numbers)
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
    """The value itself, if it is a tensor of which parts can be read.

    Raises:
        FormatError: it is none.
    """
    if not isinstance(value, StoredTensor) or value.strides is not None:
        raise FormatError(
            f"{directory} holds a partition that is no plain tensor; "
            "convert it with its zero_to_fp32.py."
        )
    return value


def _disagree(directory: Path, wanted: int, found: int) -> FormatError:
    return FormatError(
        f"{directory} holds {found} numbers in its partitions where its parameters take {wanted}; "
        "files of different saves lie there together, or one was damaged."
    )
