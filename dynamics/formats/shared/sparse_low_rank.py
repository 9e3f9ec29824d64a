"""Weights of SLTrain in checkpoints: s·B·A + S, where S is stored as its places and values.

For each layer, the authors' code (andyjm3/SLTrain, `splora_linear.py`; Han et al. 2024, arXiv
2406.02214) stores `lora_A` (r, in), `lora_B` (out, r), `sparse_value`, and `sparse_index`: places
in the flat (out, in) matrix, each once. S becomes the stored weight of the layer, and the factors
are an adapter on it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.tensors import Tensor, UnreadTensor

_A, _B, _INDEX, _VALUE = "lora_A", "lora_B", "sparse_index", "sparse_value"
_PART = re.compile(rf"(?P<path>.+)\.(?P<part>{_A}|{_B}|{_INDEX}|{_VALUE})", re.DOTALL)
_LAYERS = "sparse plus low-rank layers"


@dataclass(frozen=True)
class SparseTensor:
    """A matrix that is zero but at some places; see `Tensor`.

    Attributes:
        where: the checkpoint, for messages.
        name: of the parameter, likewise.
        index: the places, flat.
        value: the numbers there.
        shape: (out, in).
    """

    where: Path
    name: str
    index: Tensor
    value: Tensor
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """How many places there are."""
        return self.value.shape[0]

    @property
    def dtype(self) -> str:
        """That of the values."""
        return self.value.dtype

    @property
    def origin(self) -> str | None:
        """See `Tensor.origin`."""
        origins = (self.index.origin, self.value.origin)
        return None if None in origins else "\n".join(["sparse", *map(str, origins)])

    @property
    def place(self) -> object:
        """See `Tensor.place`."""
        return self.value.place

    def read(self) -> np.ndarray:
        """See `Tensor.read`.

        Raises:
            FormatError: a place lies outside of the matrix, or is there twice.
        """
        places, values = self.index.read(), self.value.read()
        flat = np.zeros(prod(self.shape), values.dtype)
        outside = places[(places < 0) | (places >= flat.size)]
        if outside.size:
            raise self._damaged(f"the place {outside[0]} of a matrix of {flat.size} numbers")
        ordered = np.sort(places)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.size:
            raise self._damaged(f"the place {twice[0]} twice")
        flat[places] = values
        return flat.reshape(self.shape)

    def _damaged(self, found: str) -> FormatError:
        return FormatError(
            f"{self.where} holds a {_INDEX} of {self.name} that has {found}; copy the checkpoint "
            "again."
        )


def with_sparse_weights(tensors: Mapping[str, Tensor], where: Path) -> Mapping[str, Tensor]:
    """The tensors with S as the weight of each layer of SLTrain, in the place of its two parts.

    A layer whose parts do not fit becomes one weight that is not read, with the reason.

    Args:
        tensors: stored name -> tensor, of all dtypes.
        where: the checkpoint, for messages.

    Returns:
        `tensors` itself where there is no such layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _PART.fullmatch(name):
            layers.setdefault(match["path"], {})[match["part"]] = tensor
    changed: dict[str, Tensor] = {}
    gone: set[str] = set()
    for path, parts in layers.items():
        if not {_A, _B} & parts.keys() or not {_INDEX, _VALUE} & parts.keys():
            continue  # LoRA, or something else
        if problem := _misfit(parts):
            shape = max((each.shape for each in parts.values()), key=prod)
            if {_A, _B} <= parts.keys():
                shape = (*parts[_B].shape[:1], *parts[_A].shape[1:])
            changed[f"{path}.weight"] = UnreadTensor(shape, f"{_LAYERS} {problem}")
            gone |= {f"{path}.{part}" for part in parts}
        else:
            shape = (parts[_B].shape[0], parts[_A].shape[1])
            name = f"{path}.weight"
            changed[name] = SparseTensor(where, name, parts[_INDEX], parts[_VALUE], shape)
            gone |= {f"{path}.{_INDEX}", f"{path}.{_VALUE}"}
    if not changed:
        return tensors
    return {name: each for name, each in tensors.items() if name not in gone} | changed


def _misfit(parts: Mapping[str, Tensor]) -> str:
    """Why the parts of a layer are none of SLTrain; empty where they are."""
    missing = [name for name in (_A, _B, _INDEX, _VALUE) if name not in parts]
    if missing:
        return f"without their {missing[0]}"
    a, b, index, value = (parts[name] for name in (_A, _B, _INDEX, _VALUE))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        return f"whose factors {a.shape} and {b.shape} have no rank in common"
    if len(value.shape) != 1 or index.shape != value.shape:
        return f"whose {_INDEX} and {_VALUE} have different lengths"
    if index.dtype not in ("int64", "int32"):
        return f"whose {_INDEX} holds {index.dtype}, not integers"
    return ""
