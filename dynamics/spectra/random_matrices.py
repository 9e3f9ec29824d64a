"""Baselines of metrics: their values for matrices of independent, identically distributed entries.

Everything is for an m x n matrix W with centred entries of variance 1, k = min(m, n) and
N = max(m, n). An initialisation with standard deviation σ has σ times these singular values and the
same ratios. To leading order, the distribution of the entries does not matter, as long as it has a
fourth moment.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

# Mean, median and 99.9 % point of the Tracy-Widom law of real matrices: Bejan 2005, table 2.
TRACY_WIDOM_MEAN = -1.2065
TRACY_WIDOM_MEDIAN = -1.2686
TRACY_WIDOM_999 = 3.2724


def marchenko_pastur_edges(rows: int, cols: int) -> tuple[float, float]:
    """The edges of the limiting spectrum of singular values: √N - √k and √N + √k.

    Marchenko & Pastur 1967; Bai & Silverstein 2010, theorem 3.6.

    Example:
        >>> marchenko_pastur_edges(100, 400)
        (10.0, 30.0)
    """
    small, large = sorted((rows, cols))
    return float(np.sqrt(large) - np.sqrt(small)), float(np.sqrt(large) + np.sqrt(small))


def marchenko_pastur_density(s: ArrayLike, rows: int, cols: int) -> np.ndarray:
    """The density of singular values at s: √((s² - s₋²)(s₊² - s²)) / (π k s); 0 outside the edges.

    It is the law of Marchenko & Pastur 1967 for λ = s², transformed: f(s) = 2s · f(λ).

    Example:
        >>> density = marchenko_pastur_density([10.0, 20.0, 30.0], 100, 400)
        >>> density * 2000 * np.pi  # at 20: √(300 · 500) / (π · 100 · 20)
        array([  0.        , 387.29833462,   0.        ])
    """
    s = np.asarray(s, dtype=np.float64)
    lower, upper = marchenko_pastur_edges(rows, cols)
    inside = (s > 0) & (s >= lower) & (s <= upper)
    x = np.where(inside, s, upper)
    density = np.sqrt((x**2 - lower**2) * (upper**2 - x**2)) / (np.pi * min(rows, cols) * x)
    return np.where(inside, density, 0.0)


def marchenko_pastur_quantiles(probability: ArrayLike, rows: int, cols: int) -> np.ndarray:
    """The singular values below which these shares of the spectrum lie, shape of `probability`.

    With a = √N, b = √k and s² = a² + b² + 2ab·cos θ, the density of θ is 2a² sin²θ / (π s²). Its
    integral from 0 (the upper edge) to θ is

        (2a²/π) · [pθ - q sin θ - 2(a² - b²) atan((a - b)/(a + b) · tan(θ/2))] / q²

    with p = a² + b² and q = 2ab. It is inverted by bisection, down to rounding.

    Example:
        >>> marchenko_pastur_quantiles([0.0, 1.0], 100, 400).round(9)  # the edges
        array([10., 30.])
    """
    above = 1 - np.asarray(probability, dtype=np.float64)
    b, a = np.sqrt(sorted((rows, cols)))
    p, q = a**2 + b**2, 2 * a * b
    low, high = np.zeros_like(above), np.full_like(above, np.pi)
    for _ in range(60):  # halves π to below float64's resolution
        theta = (low + high) / 2
        angle = np.arctan((a - b) / (a + b) * np.tan(theta / 2))
        integral = 2 * a**2 * (p * theta - q * np.sin(theta) - 2 * (a**2 - b**2) * angle)
        beyond = integral > np.pi * q**2 * above
        low, high = np.where(beyond, low, theta), np.where(beyond, theta, high)
    # s² in a form without the cancellation at the lower edge of square matrices.
    return np.sqrt((a - b) ** 2 + 2 * q * np.cos((low + high) / 4) ** 2)


@lru_cache(maxsize=512)
def marchenko_pastur_median(rows: int, cols: int) -> float:
    """The singular value below which half of the spectrum lies.

    Example:
        >>> round(marchenko_pastur_median(100, 100) / 10, 3)  # of a quarter circle of radius 2
        0.808
    """
    return float(marchenko_pastur_quantiles(0.5, rows, cols))


@lru_cache(maxsize=512)
def random_spectrum(rows: int, cols: int) -> np.ndarray:
    """The expected singular values, (k,) descending: the quantiles 1 - (i - ½)/k, i = 1 ... k.

    A single value fluctuates by less than its distance to the next one (eigenvalues are rigid). The
    first and the last value are right up to their Tracy-Widom shift. The array is shared, and
    therefore read-only.

    Example:
        >>> s = random_spectrum(100, 400)
        >>> s.shape, bool(abs((s**2).sum() / 40_000 - 1) < 1e-3)  # ‖W‖_F² = mn
        ((100,), True)
    """
    k = min(rows, cols)
    s = marchenko_pastur_quantiles(1 - (np.arange(k) + 0.5) / k, rows, cols)
    s.flags.writeable = False
    return s


@lru_cache(maxsize=512)
def random_effective_rank(rows: int, cols: int) -> float:
    """The expected effective rank: exp(-Σ pᵢ ln pᵢ) with p = s/Σs of `random_spectrum`.

    It is within 1 % of the mean of simulations for k >= 32, and within 0.2 % for k >= 384.

    Example:
        >>> round(random_effective_rank(384, 1536), 1)  # 0.966 · 384
        371.0
    """
    s = random_spectrum(rows, cols)
    p = s / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def random_per(rows: int, cols: int) -> float:
    """The expected PER, effective rank / k.

    It depends on N/k and hardly on the size: 0.805 for square matrices, 0.926 for d x 2d, 0.954 for
    d x 3d, 0.966 for d x 4d.

    Example:
        >>> [round(random_per(384, 384 * ratio), 3) for ratio in (1, 2, 3, 4)]
        [0.805, 0.926, 0.954, 0.966]
    """
    return random_effective_rank(rows, cols) / min(rows, cols)


def largest_singular_value(rows: int, cols: int, tracy_widom: float = TRACY_WIDOM_MEAN) -> float:
    """√(μ + σx) for a value x of the Tracy-Widom law; by default, the expected spectral norm.

    μ = (√(m-½) + √(n-½))², σ = √μ · (1/√(m-½) + 1/√(n-½))^⅓. Johnstone 2001 (Ann. Statist.
    29(2), theorem 1.1) with the shifts of Ma 2012 (Bernoulli 18(1), equation 5).

    Args:
        rows: m.
        cols: n.
        tracy_widom: x, by default the mean of the law.

    Example:
        >>> round(largest_singular_value(100, 400), 2)  # a little below √100 + √400
        29.64
    """
    a, b = np.sqrt(rows - 0.5), np.sqrt(cols - 0.5)
    scale = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return float(np.sqrt((a + b) ** 2 + scale * tracy_widom))


def random_stable_rank(rows: int, cols: int) -> float:
    """The expected stable rank: m·n / `largest_singular_value`², at least 1 and at most k.

    Example:
        >>> round(random_stable_rank(1000, 1000) / 1000, 2)  # mn / (√m + √n)² is k / 4
        0.25
    """
    stable_rank = rows * cols / largest_singular_value(rows, cols) ** 2
    return float(np.clip(stable_rank, 1, min(rows, cols)))


def random_condition_number(rows: int, cols: int) -> float:
    """The median of s₁/s_k. It is not the mean, which is infinite for square matrices.

    For square matrices it is n·x with exp(-2/x - 2/x²) = ½, so x = (1 + √(1 + 2 ln 2))/ln 2 = 3.67
    (Edelman 1988, SIAM J. Matrix Anal. Appl. 9(4), theorem 6.1, for n → ∞). Otherwise it is the
    ratio of the edges, each at its Tracy-Widom median: s_k = √(μ₋ - σ₋x) with
    μ₋ = (√(N-½) - √(k-½))² and σ₋ = √μ₋ · (1/√(k-½) - 1/√(N-½))^⅓ (Ma 2012, theorem 2). This is
    within 10 % of simulations where N - k >= 8, and up to 45 % too large for almost square matrices
    with 0 < N - k < 8. It is 1 for k = 1.

    Example:
        >>> round(random_condition_number(1000, 1000))
        3671
    """
    small, large = sorted((rows, cols))
    if small == 1:
        return 1.0
    if small == large:
        return float(small * (1 + np.sqrt(1 + 2 * np.log(2))) / np.log(2))
    a, b = np.sqrt(large - 0.5), np.sqrt(small - 0.5)
    scale = (a - b) * (1 / b - 1 / a) ** (1 / 3)
    smallest = np.sqrt((a - b) ** 2 - scale * TRACY_WIDOM_MEDIAN)
    return float(largest_singular_value(rows, cols, TRACY_WIDOM_MEDIAN) / smallest)
