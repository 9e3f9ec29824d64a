"""CoLA: linear layers that are two factors with a nonlinearity in between.

Liu et al. 2025, arXiv 2502.10940: y = B·silu(A x), with A (r, in) and B (out, r). There is no dense
weight: the Jacobian, B·diag(silu′(A x))·A, has rank r at most and another value at each x. What is
recorded and measured are the factors, under the names `cola_a` and `cola_b`.
"""

import torch
import torch.nn.functional as F
from torch import nn


class CoLALinear(nn.Module):
    """y = B·silu(A x).

    The factors are drawn from a normal distribution with the standard deviation
    (in + out)^(-1/4)·r^(-1/4).

    Args:
        in_features: of x.
        out_features: of y.
        rank: r.

    Example:
        >>> layer = CoLALinear(6, 4, rank=2)
        >>> x = torch.randn(6)
        >>> jacobian = torch.autograd.functional.jacobian(layer, x)
        >>> int(torch.linalg.matrix_rank(jacobian))
        2
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.cola_a = nn.Linear(in_features, rank, bias=False)
        self.cola_b = nn.Linear(rank, out_features, bias=False)
        std = (in_features + out_features) ** -0.25 * rank**-0.25
        for factor in (self.cola_a, self.cola_b):
            nn.init.normal_(factor.weight, std=std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of x (..., in_features): (..., out_features)."""
        y: torch.Tensor = self.cola_b(F.silu(self.cola_a(x)))
        return y
