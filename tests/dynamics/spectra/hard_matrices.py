"""Matrices whose singular values are hard to compute, and an independent way to compute them."""

import numpy as np
import scipy.linalg
import torch


def reference(matrix):
    """gesvd in float64: no Gram matrix, and another algorithm than `singular_values` has."""
    return scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd")


def _orthonormal(rng, m, n):
    return np.linalg.qr(rng.standard_normal((m, n)))[0]


def geometric(rng, m, n, last):
    k = min(m, n)
    return _orthonormal(rng, m, k) * np.geomspace(1, last, k) @ _orthonormal(rng, n, k).T


def _trained(rng, m, n):
    """(weight, gradient, update) of a layer that has learned something, float32."""
    torch.manual_seed(int(rng.integers(1000)))
    layer = torch.nn.Linear(n, m, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    target, start = torch.randn(n, m) / n**0.5, layer.weight.detach().clone()
    for _ in range(10):
        x = torch.randn(32, n)
        optimizer.zero_grad()
        loss = (torch.tanh(layer(x)) - torch.tanh(x @ target)).square().mean()
        loss.backward()
        optimizer.step()
    tensors = layer.weight.detach(), layer.weight.grad, layer.weight.detach() - start
    return [each.double().numpy() for each in tensors]


HARD = {
    "gaussian": lambda rng, m, n: rng.standard_normal((m, n)),
    "geometric decay to 1e-4": lambda rng, m, n: geometric(rng, m, n, 1e-4),
    "geometric decay to 1e-12": lambda rng, m, n: geometric(rng, m, n, 1e-12),
    "near-orthogonal": lambda rng, m, n: (
        geometric(rng, m, n, 1) + 1e-6 * rng.standard_normal((m, n))
    ),
    "graded rows": lambda rng, m, n: (
        rng.standard_normal((m, n)) * np.geomspace(1, 1e-8, m)[:, None]
    ),
    "graded columns": lambda rng, m, n: rng.standard_normal((m, n)) * np.geomspace(1, 1e-8, n),
    "rank 8": lambda rng, m, n: rng.standard_normal((m, 8)) @ rng.standard_normal((8, n)),
    "a row and a column twice": lambda rng, m, n: rng.standard_normal((m, n))[
        np.ix_(np.r_[0, : m - 1], np.r_[0, : n - 1])
    ],
    "positive": lambda rng, m, n: rng.random((m, n)),
    "all alike": lambda rng, m, n: 1 + 1e-3 * rng.random((m, n)),
    "signs": lambda rng, m, n: 0.1 * rng.choice([-1.0, 1.0], (m, n)),
    "trained weight": lambda rng, m, n: _trained(rng, m, n)[0],
    "gradient": lambda rng, m, n: _trained(rng, m, n)[1],
    "update": lambda rng, m, n: _trained(rng, m, n)[2],
    "a rank-8 update lost in bfloat16": lambda rng, m, n: (
        torch.from_numpy(
            1e-4 * rng.standard_normal((m, 8)) @ rng.standard_normal((8, n))
            + rng.standard_normal((m, n))
        )
        .bfloat16()
        .double()
        .numpy()
    ),
}
