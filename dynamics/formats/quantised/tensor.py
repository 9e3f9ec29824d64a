"""A quantised tensor of a checkpoint: read as numbers, together with their errors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol, Self

import numpy as np

from dynamics.errors import FormatError, one_line
from dynamics.formats.storage.tensors import ITEM_BYTES, StoredTensor, Tensor
from dynamics.runs.code_errors import CodeErrors
from dynamics.runs.run import Dense

Arrays = Mapping[str, np.ndarray]


class Numbers(Protocol):
    """What a decoder makes of the parts of a quantised tensor: `Codes`, or likewise."""

    @property
    def codes(self) -> np.ndarray:
        """An array of the shape of the numbers."""

    def values(self) -> np.ndarray:
        """The numbers, float32."""

    def errors(self) -> CodeErrors:
        """What is known of their errors."""

    def part(self, index: tuple[int | slice, ...]) -> Self:
        """A part of them; an integer drops its axis."""


class NotDequantised(Exception):
    """Why a quantised weight cannot be read as numbers; the message is a few words."""


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor that is stored as codes and scales, not read yet.

    Attributes:
        name: its stored name, for messages.
        shape: of the numbers.
        dtype: the dtype that the model computes with.
        stored: what it is made of, by role, for example "codes" and "scale".
        scheme: how it is quantised, in words that change where the numbers may change.
        decode: makes codes of the arrays by role; raises FormatError where they contradict each
            other. Codes are read as uint8, whatever their dtype of one byte is.
        index: which part of the tensor this is; empty for the whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: Mapping[str, Tensor] = field(hash=False)
    scheme: str
    decode: Callable[[Arrays], Numbers] = field(compare=False)
    index: tuple[int | slice, ...] = field(default=(), hash=False)

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return (*(each.place for each in self.stored.values()), str(self.index))

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`: it changes with the codes, the scales, and the scheme."""
        origins = [each.origin for each in self.stored.values()]
        if None in origins:
            return None
        parts = [f"{role} {each}" for role, each in zip(self.stored, origins, strict=True)]
        return "\n".join([f"{self.scheme}|{self.shape}|{self.dtype}|{self.index}", *parts])

    def read(self) -> np.ndarray:
        """See `Tensor.read`: the dequantised numbers, float32."""
        return self._codes().values()

    def dense(self) -> Dense:
        """The dequantised matrix, with the errors of its codes."""
        codes = self._codes()
        return Dense(codes.values(), self.dtype, codes.errors())

    def part(self, index: tuple[int | slice, ...]) -> "QuantisedTensor":
        """A part of this tensor, of which as little as possible is read.

        Args:
            index: along each axis; an integer drops its axis.
        """
        assert not self.index
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        shape = np.broadcast_to(0, self.shape)[index].shape
        return replace(self, shape=shape, index=index)

    def _codes(self) -> Numbers:
        stored, index = self.stored, self.index
        if len(index) > 2 and isinstance(index[0], int):  # one expert of many
            stored = {role: _layer(each, index[0]) for role, each in stored.items()}
            if any(stored[role] is not each for role, each in self.stored.items()):
                index = (0, *index[1:])
        try:
            codes = self.decode({role: _array(role, each) for role, each in stored.items()})
            if index:
                codes = codes.part(index)
        except FormatError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise damage(self.name, one_line(error)) from error
        if codes.codes.shape != self.shape:
            raise damage(self.name, f"its codes make up the shape {codes.codes.shape}")
        return codes


def damage(name: str, what: str) -> FormatError:
    """The error for codes and scales that contradict each other."""
    return FormatError(
        f"{name} is quantised, and what is stored of it does not fit together: {what}; "
        "copy the checkpoint again."
    )


def check_shape(name: str, role: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    """Check the shape of a part of a quantised tensor.

    Raises:
        FormatError: it has another.
    """
    if array.shape != expected:
        raise damage(name, f"its {role} has the shape {array.shape}, expected {expected}")


def _array(role: str, tensor: Tensor) -> np.ndarray:
    if prod(tensor.shape) > 2 * getattr(tensor, "extent", prod(tensor.shape)):
        raise FormatError(f"The {role} of a quantised tensor repeats few numbers into many.")
    return bytes_of(tensor) if role == "codes" else tensor.read()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor of one byte each, as uint8; others as they are."""
    if tensor.dtype in ("int32", "uint8"):
        return tensor.read()
    if isinstance(tensor, StoredTensor):
        return replace(tensor, dtype="uint8").read()
    values = tensor.read()
    if tensor.dtype not in ITEM_BYTES:
        return values.view(np.uint8)
    import torch

    return torch.tensor(values).to(getattr(torch, tensor.dtype)).view(torch.uint8).numpy()


def _layer(tensor: Tensor, at: int) -> Tensor:
    """The part (1, ...) of a tensor along its first axis, where it can be read alone."""
    if not isinstance(tensor, StoredTensor) or tensor.strides is not None:
        return tensor
    if len(tensor.shape) < 2 or tensor.shape[0] < 2:
        return tensor
    rest = tensor.shape[1:]
    return tensor.part(at * prod(rest), (1, *rest))


def read_json(tensor: Tensor, name: str) -> Any:
    """The JSON document whose bytes a tensor holds.

    Raises:
        FormatError: it holds none.
    """
    import json

    if tensor.dtype != "uint8" or not 0 < prod(tensor.shape) < 2**16:
        raise damage(name, f"its state is {tensor.dtype} {tensor.shape}")
    try:
        return json.loads(tensor.read().tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damage(name, f"its state is no JSON: {one_line(error)}") from error
