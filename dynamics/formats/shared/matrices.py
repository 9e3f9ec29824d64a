"""Stored tensors as matrices: experts one by one, convolutions flat, and what is no matrix."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dynamics.formats.quantised.tensor import QuantisedTensor
from dynamics.formats.storage.tensors import StoredTensor, Tensor
from dynamics.runs.account import LeftOut
from dynamics.runs.stacks import Part, parts_of


@dataclass(frozen=True)
class Matrices:
    """The tensors of a checkpoint, as matrices.

    Attributes:
        matrices: clean name -> tensor of two dimensions.
        measured: clean name -> shape of the tensors that the matrices lie in.
        left_out: the other tensors.
    """

    matrices: dict[str, Tensor]
    measured: dict[str, tuple[int, ...]]
    left_out: tuple[LeftOut, ...]


def as_matrices(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Matrices:
    """The matrices in tensors, each of them read alone where the file allows it.

    Args:
        tensors: clean name -> tensor.
        config: of the model; its `model_type` tells how experts lie.
    """
    matrices: dict[str, Tensor] = {}
    measured: dict[str, tuple[int, ...]] = {}
    left_out: list[LeftOut] = []
    for name, tensor in tensors.items():
        parts = parts_of(name, tensor.shape, config)
        if isinstance(parts, str):
            left_out.append(LeftOut(name, tensor.shape, parts))
            continue
        measured[name] = tensor.shape
        matrices |= {part.name: matrix_in(tensor, part) for part in parts}
    return Matrices(matrices, measured, tuple(left_out))


def names_of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> set[str]:
    """The names of tensors, and those of the matrices that they are read as."""
    return {*tensors, *as_matrices(tensors, config).matrices}


def matrix_in(tensor: Tensor, part: Part) -> Tensor:
    """One matrix of a tensor; only its own bytes are read where they lie in one file."""
    if tensor.shape == (part.rows, part.cols):
        return tensor
    if isinstance(tensor, StoredTensor):
        view = _view(tensor, part)
        if view is not None:
            return view
    if isinstance(tensor, QuantisedTensor) and part.index:
        quantised = tensor.part(part.index)
        if quantised.shape == (part.rows, part.cols):
            return quantised
    return PartOfTensor(tensor, part)


@dataclass(frozen=True)
class PartOfTensor:
    """A matrix of a tensor that has to be read as a whole, such as one in shards."""

    whole: Tensor
    part: Part

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols)."""
        return self.part.rows, self.part.cols

    @property
    def dtype(self) -> str:
        """See `Tensor.dtype`."""
        return self.whole.dtype

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`."""
        origin = self.whole.origin
        return origin and f"{origin}|{self.part.index}"

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return self.whole.place, str(self.part.index)

    def read(self) -> np.ndarray:
        """See `Tensor.read`."""
        return self.part.of(_read_whole(self.whole))


# The experts of a layer are read one after another, from two tensors.
_recently_read: deque[tuple[Tensor, np.ndarray]] = deque(maxlen=2)


def _read_whole(tensor: Tensor) -> np.ndarray:
    for kept, values in tuple(_recently_read):
        if kept is tensor:
            return values
    values = tensor.read()
    _recently_read.append((tensor, values))
    return values


def _view(tensor: StoredTensor, part: Part) -> StoredTensor | None:
    """The matrix as a tensor of its own within the same file; None where it is no such view."""
    shape = part.rows, part.cols
    if not part.index:
        flat = tensor.strides is None
        return replace(tensor, shape=shape) if flat else None
    strides = tensor.strides or tuple(
        int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape))
    )
    # One byte stands for a number. NumPy computes where the part lies; nothing is read.
    whole = np.lib.stride_tricks.as_strided(np.empty(1, np.int8), tensor.shape, strides)
    piece = whole[part.index]
    if piece.shape != shape:
        return None
    first = piece.ctypes.data - whole.ctypes.data
    return replace(
        tensor,
        offset=tensor.offset + first * tensor.item_bytes,
        shape=shape,
        strides=None if piece.flags.c_contiguous else piece.strides,
    )
