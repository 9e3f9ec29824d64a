"""Methods that scale the rows or columns of the base weight: IA3."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from dynamics.formats.shared.adapters.methods.place import NotComputed, Place, Recipe


def ia3(at: Place) -> Recipe:
    """W · l: per output, or per input of a feed-forward layer.

    l is (out, 1) or (1, in); for convolutions (1, channels, 1, ...), of either.
    """
    parts = at.parts("ia3_l")
    shape = parts["ia3_l"].shape
    of_inputs = shape[:1] == (1,)
    if len(shape) > 2:
        of_inputs, of_outputs = (shape[1] == size for size in at.shape[1::-1])
        if of_inputs and of_outputs:
            raise NotComputed("IA3 adapters on convolutions with as many inputs as outputs")
    return Recipe(parts, partial(_ia3, in_out=at.in_out, of_inputs=of_inputs))


def _ia3(
    base: np.ndarray, parts: Mapping[str, np.ndarray], *, in_out: bool, of_inputs: bool
) -> np.ndarray:
    scale = parts["ia3_l"].reshape(-1)
    axis = int(of_inputs != in_out)
    return base * scale.reshape([-1 if each == axis else 1 for each in range(base.ndim)])
