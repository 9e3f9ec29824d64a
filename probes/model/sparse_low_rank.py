"""Layers of SLTrain: their weight is a low-rank product plus a sparse matrix, W = s·B·A + S.

Han et al. 2024, arXiv 2406.02214. Such a layer is known by the names that the authors' code gives
its parts, whatever its class: parameters `lora_A` (r, in), `lora_B` (out, r) and `sparse_value`,
and a buffer `sparse_index` with the places of the values in the flat (out, in) matrix. `base` is S
and `adapter` is s·B·A. Both train.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from probes.model.twin import whole
from probes.model.weight import Factors, NotRead, Weight, not_read, plain_weight

NO_SCALE = "sparse plus low-rank layers whose scaling is not known: give them an attribute scaling"
_FACTORS = ("lora_A", "lora_B", "scaling")


def is_sparse_low_rank(module: nn.Module) -> bool:
    """Whether a module has the parts of a layer of SLTrain, and they fit each other."""
    a, b, value = (module._parameters.get(name) for name in ("lora_A", "lora_B", "sparse_value"))
    index = module._buffers.get("sparse_index")
    if a is None or b is None or value is None or index is None:
        return False
    return a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and index.shape == value.shape


def weights_of_sparse_low_rank(layer: Any, path: str) -> Iterator[Weight | NotRead]:
    """The weight of a layer of SLTrain, and its other parameters.

    Args:
        layer: one that `is_sparse_low_rank`.
        path: its name, with a dot at the end unless it is the model itself.
    """
    is_known = _scaling(layer) is not None
    if is_known:
        a, b, value = layer.lora_A, layer.lora_B, layer.sparse_value
        yield Weight(
            f"{path}weight",
            None,
            (b.shape[0], a.shape[1]),
            a.dtype,
            layer,
            SparseLowRankSource(layer),
            (value,),
            stored_as=(f"{path}sparse_value", tuple(value.shape)),
        )
    for name, parameter in layer._parameters.items():
        if parameter is None or (is_known and name == "sparse_value"):
            continue
        if name not in (*_FACTORS, "sparse_value"):
            yield plain_weight(path + name, parameter, layer)
        elif is_known:
            yield not_read(path + name, parameter, "adapter factors", True)
        else:
            yield not_read(path + name, parameter, NO_SCALE)


@dataclass(frozen=True)
class SparseLowRankSource:
    """The weight of a layer of SLTrain, as the layer computes it now."""

    layer: Any
    is_adapted: ClassVar[bool] = True
    base_trains: ClassVar[bool] = True

    def read(self) -> torch.Tensor:
        """W: the `weight` that the layer forms, where it has one and can, else s·B·A + S.

        It cannot where its parts are sharded (FSDP2): the index of its buffer is that of the whole.
        """
        sharded = any(isinstance(each, DTensor) for each in self.layer._parameters.values())
        if not sharded and isinstance(getattr(type(self.layer), "weight", None), property):
            weight: torch.Tensor = self.layer.weight
            return weight.detach()
        a, b, scaling, _ = self.factors()
        return scaling * (whole(b) @ whole(a)) + self.base()

    def base(self) -> torch.Tensor:
        """S (out, in), in the dtype of its values."""
        layer = self.layer
        value = whole(layer.sparse_value.detach())
        shape = layer.lora_B.shape[0], layer.lora_A.shape[1]
        flat = value.new_zeros(shape[0] * shape[1])
        return flat.scatter_(0, layer.sparse_index, value).view(shape)

    def factors(self) -> Factors:
        """A and B. As in the authors' code, a trained scaling goes through tanh, and into A."""
        layer, scaling = self.layer, _scaling(self.layer)
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        if isinstance(scaling, torch.Tensor):
            return Factors(a * whole(scaling.detach()).tanh(), b, 1.0, False)
        assert scaling is not None
        return Factors(a, b, scaling, False)


def _scaling(layer: Any) -> float | torch.Tensor | None:
    scaling = getattr(layer, "scaling", None)
    if isinstance(scaling, torch.Tensor):
        return scaling if scaling.numel() == 1 else None
    if isinstance(scaling, int | float) and not isinstance(scaling, bool):
        return float(scaling)
    return None
