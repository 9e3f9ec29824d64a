"""The largest singular value of independent, centred entries with different variances."""

from collections.abc import Callable

import numpy as np

# (values, how often each)
Profile = tuple[np.ndarray, np.ndarray]

# The grid of P in `edge_of_profile`, 1/(1 + e^-u). It is dense near 0 and 1, where the minimum of
# matrices far from square lies.
_U = np.linspace(-9, 9, 193)
_GRID = 1 / (1 + np.exp(-_U))
_STRIDE = 8  # of the first, coarse search on the grid
_MANY = 2048  # rows or columns above which similar ones are grouped


def edge_of_profile(rows: np.ndarray, cols: np.ndarray) -> tuple[float, float]:
    """(λ₊, γ) of EEᵀ: its largest eigenvalue is about λ₊ + γ·x with x from the Tracy-Widom law.

    E has independent, centred entries with the variances r_i c_j / Σr. Let a = r/max r,
    b = c/max c, A(P) = Σ a/(1 - aP) and B(Q) = Σ b/(1 - bQ). The Dyson equation of the profile is
    λ = A(P)/Q = B(Q)/P, and λ₊ is the minimum of λ over 0 < P < 1 (Lehner 1999, for general
    profiles). Near the minimum, λ = λ₊ + ½λ''(P - P₀)², and the trace of the resolvent is
    T = Σ 1/(1 - aP) / λ. The eigenvalues therefore have the density T'√(2/λ'' · (λ₊ - λ))/π, which
    is that of the Airy process of scale γ = (λ''/2T'²)^⅓. For a = b = 1, γ is Johnstone's σ; for
    b = 1 it is that of El Karoui 2007 (Ann. Probab. 35(2), theorem 1).

    Args:
        rows: r, (m,) row sums of the variances, not all zero.
        cols: c, (n,) column sums, with the same total.

    Example:
        >>> edge, _ = edge_of_profile(np.full(64, 16.0), np.full(16, 64.0))  # variances of 1
        >>> round(edge, 3)  # (√64 + √16)²
        144.0
    """
    a, b = _profile(rows), _profile(cols)
    at, near_a, near_q = _minimum(a, b)
    near = slice(at - 1, at + 2)
    # One Newton step: the kinks of the interpolation would spoil the second derivative.
    q = near_q[:, None]
    wanted = _GRID[near] * near_a
    q = q[:, 0] - (_sum(b, lambda x: x * q / (1 - x * q)) - wanted) / _sum(
        b, lambda x: x / (1 - x * q) ** 2
    )
    # γ does not depend on the parameter of the curve; a parabola fits best in u.
    before, value, after = near_a / q
    step = _U[1] - _U[0]
    half_second, first = (before - 2 * value + after) / (2 * step**2), (after - before) / (2 * step)
    minimum = value - first**2 / (4 * half_second)
    p = 1 / (1 + np.exp(first / (2 * half_second) - _U[at]))
    trace_slope = p * (1 - p) * _sum(a, lambda x: x / (1 - x * p) ** 2) / minimum
    unit = rows.max() * cols.max() / rows.sum()
    return float(unit * minimum), float(unit * np.cbrt(half_second / trace_slope**2))


def _profile(sums: np.ndarray) -> Profile:
    """Row or column sums relative to the largest one, and how often each occurs.

    On a long side, such as a vocabulary, sums that differ by less than a thousandth are replaced by
    their mean. This changes λ₊ by 1e-7.
    """
    x = sums / sums.max()
    if x.size <= _MANY:
        return x, np.ones(x.size)
    group = np.minimum(-np.log(np.maximum(x, 1e-300)) * 1000, 1e5).astype(np.int64)
    counts, of_group = np.bincount(group), np.bincount(group, weights=x)
    used = counts > 0
    return of_group[used] / counts[used], counts[used]


def _sum(profile: Profile, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Σ function(x) over a profile, along the last axis."""
    x, counts = profile
    return np.asarray(function(x) @ counts)


def _minimum(a: Profile, b: Profile) -> tuple[int, np.ndarray, np.ndarray]:
    """The grid point P where A(P)/Q is smallest, and A and Q there and at its two neighbours.

    Every 8th point is searched first, then all points near the best one. The result is that of the
    whole grid, with a fifth of its sums; these take half of the time of a small matrix.
    """
    coarse = np.arange(0, _GRID.size, _STRIDE)
    coarse_a, coarse_b = _resolvent(a, coarse), _resolvent(b, coarse)
    q = _matching(coarse_a, coarse, coarse_b, coarse)
    guess = int(coarse[np.nanargmin(coarse_a / q)]) if np.isfinite(q).any() else 0
    p_index = np.arange(max(guess - _STRIDE - 1, 0), min(guess + _STRIDE + 2, _GRID.size))
    sums_a = _resolvent(a, p_index)
    low, high = np.searchsorted(_GRID[coarse] * coarse_b, (_GRID[p_index] * sums_a)[[0, -1]])
    q_index = np.arange(coarse[max(low - 1, 0)], coarse[min(high, coarse.size - 1)] + 1)
    q = _matching(sums_a, p_index, _resolvent(b, q_index), q_index)
    least = int(np.nanargmin(sums_a / q)) if np.isfinite(q).any() else 0
    inner = 0 < least < p_index.size - 1
    if not inner:
        p_index = q_index = np.arange(_GRID.size)
        sums_a = _resolvent(a, p_index)
        q = _matching(sums_a, p_index, _resolvent(b, q_index), q_index)
        least = int(np.clip(np.nanargmin(sums_a / q), 1, _GRID.size - 2))
    near = slice(least - 1, least + 2)
    return int(p_index[least]), sums_a[near], q[near]


def _resolvent(profile: Profile, index: np.ndarray) -> np.ndarray:
    """Σ x/(1 - xP) at these points of the grid of P."""
    return _sum(profile, lambda x: x / (1 - _GRID[index, None] * x))


def _matching(
    sums_a: np.ndarray, p_index: np.ndarray, sums_b: np.ndarray, q_index: np.ndarray
) -> np.ndarray:
    """For each P the Q with Q·B(Q) = P·A(P); both sides grow. NaN where Q is outside the grid."""
    log_grid = np.log(_GRID)
    products = np.log(_GRID[p_index] * sums_a), np.log(_GRID[q_index] * sums_b)
    return np.exp(np.interp(*products, log_grid[q_index], left=np.nan, right=np.nan))
