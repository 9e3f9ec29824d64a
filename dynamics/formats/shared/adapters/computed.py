"""Weights that are computed, when they are read, from a stored weight and an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.tensors import Tensor


@dataclass(frozen=True)
class ComputedTensor:
    """A weight that a formula makes of a base weight; see `Tensor`.

    Attributes:
        name: of the parameter, for messages.
        base: the weight without the adapter.
        parts: what the formula takes beside it.
        formula: (base weight, part -> its numbers) -> weight, all float64 and of the shapes that
            are stored. A partial of a function of its module: runs are handed to workers.
    """

    name: str
    base: Tensor
    parts: Mapping[str, Tensor] = field(hash=False)
    formula: "partial[np.ndarray]"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base weight."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """The dtype of the base weight, in which the model would store it."""
        return self.base.dtype

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`."""
        origins = [self.base.origin, *(each.origin for each in self.parts.values())]
        if None in origins:
            return None
        made = f"{self.formula.func.__name__} {self.formula.keywords}"
        return "\n".join([made, *(str(each) for each in origins)])

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return (self.formula.func.__name__, self.base.place)

    def read(self) -> np.ndarray:
        """See `Tensor.read`; float64."""
        base = self.base.read().astype(np.float64)
        parts = {name: each.read().astype(np.float64) for name, each in self.parts.items()}
        try:
            with np.errstate(all="ignore"):
                weight = self.formula(base, parts)
        except (ValueError, IndexError, np.linalg.LinAlgError) as error:
            raise FormatError(
                f"{self.name} cannot be computed from its adapter, whose parts do not fit: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}."
            ) from error
        if weight.shape != base.shape:
            raise FormatError(
                f"{self.name} has shape {base.shape}, but its adapter makes {weight.shape} of it."
            )
        return weight
