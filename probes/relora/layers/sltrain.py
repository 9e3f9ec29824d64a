"""SLTrain: linear layers whose weight is a low-rank product plus a sparse matrix.

Han et al. 2024, arXiv 2406.02214: W = s·B·A + S, with A (r, in), B (out, r), and S zero but at
random places that are drawn once. All of A, B and the entries of S train.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SLTrainLinear(nn.Module):
    """y = (s·B·A + S) x.

    A is drawn Kaiming-uniform and B is zero, so the first weight is S, whose entries are uniform in
    ±1/√in. The parameters have the names of the published checkpoints: `lora_A`, `lora_B` and
    `sparse_value`, and the buffer `sparse_index` has the places as sorted indices of the flat
    (out, in) matrix. The weight is formed in every forward pass, in the dtype of the parameters.

    Args:
        in_features: of x.
        out_features: of y.
        rank: r.
        scaling: s.
        sparsity: δ; S has int(δ·out·in) entries.

    Example:
        >>> layer = SLTrainLinear(8, 4, rank=2, scaling=2.0, sparsity=0.25)
        >>> layer.sparse_value.numel(), int(layer.weight.count_nonzero())
        (8, 8)
    """

    sparse_index: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, scaling: float, sparsity: float
    ):
        super().__init__()
        self.in_features, self.out_features, self.scaling = in_features, out_features, scaling
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        numbers = out_features * in_features
        places = torch.randperm(numbers)[: sparse_entries(out_features, in_features, sparsity)]
        self.register_buffer("sparse_index", places.sort().values)
        edge = in_features**-0.5
        self.sparse_value = nn.Parameter(torch.empty(len(places)).uniform_(-edge, edge))

    @property
    def weight(self) -> torch.Tensor:
        """s·B·A + S (out, in), through which gradients reach the parameters."""
        # Autocast would round the product before S is added.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            product = self.scaling * (self.lora_B @ self.lora_A)
            whole = product.flatten().scatter_add(0, self.sparse_index, self.sparse_value)
        return whole.view_as(product)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of x (..., in_features): (..., out_features)."""
        return F.linear(x, self.weight)


def sparse_entries(out_features: int, in_features: int, sparsity: float) -> int:
    """How many entries S has."""
    return int(sparsity * out_features * in_features)
