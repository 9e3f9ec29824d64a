"""Noise floors: the largest singular value that rounding alone can produce.

A number stored in a dtype is known only to half a unit in the last place (ulp). The rounding errors
of a matrix are a matrix E themselves, and by Weyl's inequality |s_i(W + E) - s_i(W)| <= ‖E‖. A
singular value below the spectral norm of E therefore says nothing about the model.

The errors are taken as independent and uniform, within half an ulp either way. Three numbers
follow:

    noise_norm         the expectation of ‖E‖
    noise_norm_bound   one matrix in a thousand exceeds it; `noise_floor` is this number
    noise_limit        no rounding can exceed it; 2 to 50 times larger

The errors of a quantised matrix are those of its codes (`CodeErrors`): what it was unpacked to says
nothing about them.

The errors are not independent where the stored values repeat a pattern. A rank-one product in an
8-bit float has up to twice the noise of the bound. Numbers that all lie within one ulp are not
spread evenly within it. Only `noise_limit` covers constant matrices.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np

from dynamics.runs.code_errors import CodeErrors
from dynamics.spectra.random_matrices import TRACY_WIDOM_999, TRACY_WIDOM_MEAN
from dynamics.spectra.rounding import Stored, rounding_variance, spacing, variance_sums
from dynamics.spectra.variance_profiles import edge_of_profile

_DRAWS = 4
_LARGEST = 1e150  # sum of variances: the product of two does not overflow
_SHRINK = 2.0**-600  # makes larger numbers smaller, exactly


def noise_variance(*stored: Stored) -> np.ndarray:
    """The sum of `rounding_variance` over the terms of a sum or difference, (m, n) float64.

    The errors of the terms are independent. Pass a matrix that was rounded K times, once at each
    merge, as K terms; the same tuple passed K times is computed once.

    Args:
        stored: (values, dtype) or (values, "int8", scale) of each term, all values (m, n).

    Example:
        >>> term = np.array([[1.5]]), "float32"
        >>> noise_variance(term, term) == 2 * rounding_variance(*term)
        array([[ True]])
    """
    counts = Counter(map(id, stored))
    total: np.ndarray | None = None
    for term in {id(each): each for each in stored}.values():
        variance = rounding_variance(*term)
        variance *= counts[id(term)]
        total = variance if total is None else np.add(total, variance, out=total)
    assert total is not None, "a sum has terms"
    return total


def noise_norm(variance: np.ndarray) -> float:
    """The expected spectral norm of independent, centred noise with these variances.

    It is √(λ₊ - 1.2065γ), with the edge λ₊ of the limiting spectrum of EEᵀ and the mean of the
    Tracy-Widom law on its scale γ. Both are those of the variances r_i c_j / Σv, which have the row
    sums r and the column sums c of `variance` (`edge_of_profile`). For equal variances,
    λ₊ = σ²(√m + √n)². The result is at least 0.87 times the norm of the largest row or column,
    because a single row or column has up to that.

    Compared with simulated rounding, it is 0.99 to 1.07 times the mean for Gaussian matrices of
    32 x 32 to 2048 x 2048, 0.99 to 1.15 times for graded ones (rows and columns over 2 or 3
    decades), and up to 1.27 times for a matrix with one row 100 times larger than the rest.

    Args:
        variance: (m, n), of each entry.

    Example:
        >>> norm = noise_norm(np.ones((400, 100)))
        >>> bool(0.95 < norm / (20 + 10) < 1)  # a little below the edge √400 + √100
        True
    """
    rows, cols = variance.sum(axis=1), variance.sum(axis=0)
    if not rows.any():
        return 0.0
    edge, scale = edge_of_profile(rows, cols)
    single = 0.75 * max(rows.max(), cols.max())  # the mean of |x| for uniform x is σ√3/2
    return float(np.sqrt(max(edge + TRACY_WIDOM_MEAN * scale, single)))


def noise_norm_bound(variance: np.ndarray) -> float:
    """The spectral norm that such noise exceeds with a probability of about 1/1000.

    It is the larger of two numbers. One is √(λ₊ + 3.27γ), the 99.9 % point of the Tracy-Widom law.
    The other is

        √(max_i Σ_j v_ij) + √(max_j Σ_i v_ij),

    the leading term of Bandeira & van Handel 2016 (Ann. Probab. 44(4), theorem 3.1). It also holds
    where the variances are not products of a row's and a column's. The bound holds with high
    probability, not with certainty; `noise_limit` is certain. It is 1.01 to 1.5 times the actual
    norm for Gaussian matrices, and up to 3.3 times for graded ones.

    Args:
        variance: (m, n), of each entry.

    Example:
        >>> variance = np.ones((400, 100))
        >>> bool(1 < noise_norm_bound(variance) / noise_norm(variance) < 1.1)
        True
    """
    return bound_of_sums(variance.sum(axis=1), variance.sum(axis=0))


def bound_of_sums(rows: np.ndarray, cols: np.ndarray) -> float:
    """`noise_norm_bound` of variances with these row sums (m,) and column sums (n,).

    It is Inf where a sum is above 1e150, whose products overflow; `noise_floor` scales these.

    Example:
        >>> bound_of_sums(np.full(400, 100.0), np.full(100, 400.0)) == noise_norm_bound(
        ...     np.ones((400, 100))
        ... )
        True
    """
    if not rows.any():
        return 0.0
    if not max(rows.max(), cols.max()) < _LARGEST:
        return float("inf")
    edge, scale = edge_of_profile(rows, cols)
    flat = np.sqrt(edge + TRACY_WIDOM_999 * scale)
    return float(max(flat, np.sqrt(rows.max()) + np.sqrt(cols.max())))


def noise_limit(*stored: Stored) -> float:
    """What the spectral norm of the rounding of a sum or difference can never exceed.

    It is √(max_i Σ_j h_ij · max_j Σ_i h_ij), where h is the sum of the terms' largest errors, ulp/2
    or scale/2: ‖E‖₂² <= ‖E‖₁‖E‖_∞ for any signs. It is about √n times `noise_floor`, and meant for
    proofs.

    Args:
        stored: (values, dtype) or (values, "int8", scale) of each term, all values (m, n).

    Example:
        >>> noise_limit((np.full((3, 3), 1.5), "float16")) == 3 * 2.0**-11  # 3 · ulp / 2
        True
    """
    half = np.zeros(stored[0][0].shape)
    for term in stored:
        half += spacing(*term) / 2
    return float(np.sqrt(half.sum(axis=1).max() * half.sum(axis=0).max()))


def noise_floor(
    *stored: Stored,
    repeated: tuple[Stored, int] | None = None,
    sums: Callable[[Stored], tuple[np.ndarray, np.ndarray]] | None = None,
) -> float:
    """The level that a singular value of a sum or difference of stored matrices must exceed.

    It is `noise_norm_bound` of `noise_variance`, and not the expectation: every second matrix that
    is nothing but rounding would exceed that.

    Args:
        stored: (values, dtype) or (values, "int8", scale) of each term, all values (m, n). One term
            for a matrix itself, two for the difference of two checkpoints.
        repeated: one more term, and how many times it was rounded.
        sums: computes `variance_sums`. A backend passes a method that computes them once per array,
            because a checkpoint is part of many differences.

    Example:
        >>> weight = np.random.default_rng(0).standard_normal((64, 32))
        >>> fine, coarse = (noise_floor((weight, dtype)) for dtype in ("float32", "float64"))
        >>> fine / coarse == 2.0**29  # significands of 23 and 52 bits
        True
    """
    sums = sums or variance_sums
    counts = Counter(map(id, stored))
    terms = [(each, counts[id(each)]) for each in {id(each): each for each in stored}.values()]
    terms += [] if repeated is None else [repeated]
    rows: np.ndarray | float = 0.0
    cols: np.ndarray | float = 0.0
    for term, count in terms:
        with np.errstate(over="ignore"):
            of_rows, of_cols = sums(term)
            rows, cols = rows + count * of_rows, cols + count * of_cols
    rows, cols = np.asarray(rows), np.asarray(cols)
    if not max(rows.max(), cols.max()) < _LARGEST:
        shrunk = repeated and (_shrunk(repeated[0]), repeated[1])
        return noise_floor(*map(_shrunk, stored), repeated=shrunk) / _SHRINK
    return bound_of_sums(rows, cols)


def _shrunk(term: Stored) -> Stored:
    values = np.multiply(term[0], _SHRINK, dtype=np.float64)
    if len(term) == 2:
        return values, term[1]
    if isinstance(term[2], CodeErrors):
        return values, term[1], term[2].scaled(_SHRINK)
    return values, term[1], np.multiply(term[2], _SHRINK)


def product_noise_norm(left: Stored, right: Stored) -> float:
    """The expectation of ‖(L + δL)(R + δR) - LR‖ = ‖δL·R + L·δR + δL·δR‖.

    The two first-order terms meet only in r of the m and r of the n directions, which no profile of
    variances describes. The result is therefore the mean of 4 simulated roundings. They are
    seeded, and each is within a few per cent of the mean. They are measured as
    [δL, L + δL] @ [R; δR], so no (m, n) matrix is formed.

    Args:
        left: L (m, r), its dtype, and for int8 its scale.
        right: R (r, n), likewise.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> left, right = rng.standard_normal((90, 4)), rng.standard_normal((4, 60))
        >>> factors = (left, "bfloat16"), (right, "bfloat16")
        >>> bool(1 < product_noise_bound(*factors) / product_noise_norm(*factors) < 3)
        True
    """
    rng = np.random.default_rng(0)
    widths = [np.sqrt(3 * rounding_variance(*factor)) for factor in (left, right)]
    norms = []
    for _ in range(_DRAWS):
        d_left, d_right = (width * rng.uniform(-1, 1, width.shape) for width in widths)
        _, r1 = np.linalg.qr(np.hstack([d_left, left[0] + d_left]))
        _, r2 = np.linalg.qr(np.vstack([right[0], d_right]).T)
        norms.append(np.linalg.norm(r1 @ r2.T, 2))
    return float(np.mean(norms))


def product_noise_bound(
    left: Stored,
    right: Stored,
    norms: tuple[float, float] | None = None,
    noise: tuple[float, float] | None = None,
) -> float:
    """‖δL‖‖R‖ + ‖L‖‖δR‖ + ‖δL‖‖δR‖, with `noise_floor` for ‖δL‖ and ‖δR‖.

    The bound holds whenever these two floors hold. It is about twice the expectation where r is
    small, because the first two terms then lie in different directions.

    Args:
        left: L (m, r), its dtype, and for int8 its scale.
        right: R (r, n), likewise.
        norms: ‖L‖ and ‖R‖, if they are known.
        noise: ‖δL‖ and ‖δR‖, if they are known.

    Example:
        >>> left, right = (np.array([[1.5]]), "float32"), (np.array([[1.5]]), "float32")
        >>> floor = noise_floor(left)
        >>> product_noise_bound(left, right) == 2 * 1.5 * floor + floor**2
        True
    """
    norm_left, norm_right = norms or (_norm(left[0]), _norm(right[0]))
    d_left, d_right = noise or (noise_floor(left), noise_floor(right))
    return float(d_left * norm_right + norm_left * d_right + d_left * d_right)


def _norm(factor: np.ndarray) -> float:
    tall = factor if factor.shape[0] > factor.shape[1] else factor.T
    return float(np.linalg.norm(np.linalg.qr(tall.astype(np.float64), mode="r"), 2))
