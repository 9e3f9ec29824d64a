"""What a matrix of independent, identically distributed entries gives: the baselines of metrics.

Everything is for an m x n matrix W of centred entries of variance 1, k = min(m, n), N = max(m, n);
an initialisation of standard deviation σ has σ times the singular values and the same ratios. The
entries' distribution does not matter to leading order, only that it has a fourth moment.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

# Mean, median and 99.9 % point of the Tracy-Widom law of real matrices: Bejan 2005, table 2.
TRACY_WIDOM_MEAN = -1.2065
TRACY_WIDOM_MEDIAN = -1.2686
TRACY_WIDOM_999 = 3.2724


def marchenko_pastur_edges(rows: int, cols: int) -> tuple[float, float]:
    """The singular values between which the limiting spectrum lies: √N - √k and √N + √k.

    Marchenko & Pastur 1967; Bai & Silverstein 2010, theorem 3.6.
    """
    small, large = sorted((rows, cols))
    return float(np.sqrt(large) - np.sqrt(small)), float(np.sqrt(large) + np.sqrt(small))


def marchenko_pastur_density(s: ArrayLike, rows: int, cols: int) -> np.ndarray:
    """Density of the singular values at s: √((s² - s₋²)(s₊² - s²)) / (π k s), 0 outside the edges.

    The law of Marchenko & Pastur 1967 for λ = s², transformed: f(s) = 2s · f(λ).
    """
    s = np.asarray(s, dtype=np.float64)
    lower, upper = marchenko_pastur_edges(rows, cols)
    inside = (s > 0) & (s >= lower) & (s <= upper)
    x = np.where(inside, s, upper)
    density = np.sqrt((x**2 - lower**2) * (upper**2 - x**2)) / (np.pi * min(rows, cols) * x)
    return np.where(inside, density, 0.0)


def marchenko_pastur_quantiles(probability: ArrayLike, rows: int, cols: int) -> np.ndarray:
    """The singular values below which this share of the spectrum lies, shape of `probability`.

    With a = √N, b = √k and s² = a² + b² + 2ab·cos θ the density of θ is
    2a² sin²θ / (π s²), whose integral from 0 (the upper edge) to θ is

        (2a²/π) · [pθ - q sin θ - 2(a² - b²) atan((a - b)/(a + b) · tan(θ/2))] / q²

    for p = a² + b², q = 2ab. It is inverted by bisection, to rounding.
    """
    above = 1 - np.asarray(probability, dtype=np.float64)
    b, a = np.sqrt(sorted((rows, cols)))
    p, q = a**2 + b**2, 2 * a * b
    low, high = np.zeros_like(above), np.full_like(above, np.pi)
    for _ in range(60):  # halves π to below float64's resolution
        theta = (low + high) / 2
        angle = np.arctan((a - b) / (a + b) * np.tan(theta / 2))
        found = 2 * a**2 * (p * theta - q * np.sin(theta) - 2 * (a**2 - b**2) * angle)
        beyond = found > np.pi * q**2 * above
        low, high = np.where(beyond, low, theta), np.where(beyond, theta, high)
    # The same s² without the cancellation at the lower edge of square matrices.
    return np.sqrt((a - b) ** 2 + 2 * q * np.cos((low + high) / 4) ** 2)


@lru_cache(maxsize=512)
def marchenko_pastur_median(rows: int, cols: int) -> float:
    """The singular value that half of the spectrum lies below."""
    return float(marchenko_pastur_quantiles(0.5, rows, cols))


@lru_cache(maxsize=512)
def random_spectrum(rows: int, cols: int) -> np.ndarray:
    """The expected singular values, (k,) descending: the quantiles 1 - (i - ½)/k, i = 1 ... k.

    Read-only, because it is shared. Single values fluctuate by less than the distance to the next
    one (eigenvalues are rigid); the first and last stand within their Tracy-Widom shift.
    """
    k = min(rows, cols)
    s = marchenko_pastur_quantiles(1 - (np.arange(k) + 0.5) / k, rows, cols)
    s.flags.writeable = False
    return s


@lru_cache(maxsize=512)
def random_effective_rank(rows: int, cols: int) -> float:
    """Expected effective rank: exp(-Σ pᵢ ln pᵢ), p = s/Σs, of `random_spectrum`.

    Within 1 % of the mean of simulations from k = 32 on, and within 0.2 % from k = 384 on.
    """
    s = random_spectrum(rows, cols)
    p = s / s.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def random_per(rows: int, cols: int) -> float:
    """Expected PER, effective rank / k.

    It depends on N/k, hardly on the size: 0.805 for square matrices, 0.926 for d x 2d, 0.954 for
    d x 3d, 0.966 for d x 4d.
    """
    return random_effective_rank(rows, cols) / min(rows, cols)


def largest_singular_value(rows: int, cols: int, tracy_widom: float = TRACY_WIDOM_MEAN) -> float:
    """√(μ + σx) for a value x of the Tracy-Widom law: by default the expected spectral norm.

    μ = (√(m-½) + √(n-½))², σ = √μ · (1/√(m-½) + 1/√(n-½))^⅓. Johnstone 2001 (Ann. Statist.
    29(2), theorem 1.1) with the shifts of Ma 2012 (Bernoulli 18(1), equation 5).
    """
    a, b = np.sqrt(rows - 0.5), np.sqrt(cols - 0.5)
    scale = (a + b) * (1 / a + 1 / b) ** (1 / 3)
    return float(np.sqrt((a + b) ** 2 + scale * tracy_widom))


def random_stable_rank(rows: int, cols: int) -> float:
    """Expected stable rank: m·n / `largest_singular_value`², no less than 1 and no more than k."""
    found = rows * cols / largest_singular_value(rows, cols) ** 2
    return float(np.clip(found, 1, min(rows, cols)))


def random_condition_number(rows: int, cols: int) -> float:
    """The median of s₁/s_k. Square matrices have no expected one: its mean is infinite.

    Square: n·x with exp(-2/x - 2/x²) = ½, which is x = (1 + √(1 + 2 ln 2))/ln 2 = 3.67 (Edelman
    1988, SIAM J. Matrix Anal. Appl. 9(4), theorem 6.1, for n → ∞). Otherwise the ratio of the
    edges, each at its Tracy-Widom median: s_k = √(μ₋ - σ₋x) with μ₋ = (√(N-½) - √(k-½))² and
    σ₋ = √μ₋ · (1/√(k-½) - 1/√(N-½))^⅓ (Ma 2012, theorem 2). Within 10 % of simulations where
    N - k >= 8; up to 45 % too large for the almost square ones between.
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
