"""What two records of one adapted weight show together: a merge, a reset, a base that moved.

Symbols: N is the record at a merge, N' the next record. W is the effective weight (base plus
adapter), D = s·B·A the product of the adapter. A base weight lies on the grid of its dtype, so
base = round(W - D) gives back the stored base exactly. All norms are Frobenius norms.
"""

from dataclasses import dataclass

import numpy as np

from dynamics.auditing.rounding import fitted_scale, frobenius_norm, product_error, rounded
from dynamics.runs.run import Dense, Factored
from dynamics.spectra.numpy_spectrum import singular_values
from dynamics.spectra.rounding import rounding_variance, ulp


@dataclass(frozen=True)
class AdaptedWeight:
    """The effective weight and the adapter of one parameter in one record."""

    step: int
    weight: Dense
    adapter: Factored


@dataclass(frozen=True)
class Merge:
    """The numbers of a merge at a record N, from N and the next record N'.

    Attributes:
        step: N.
        scaling: s.
        dtype: the dtype of the stored weight.
        update: ‖D‖ at N.
        residual: ‖base(N') - W(N)‖ = ‖Δbase - D‖: how far the merge moved the function.
        bound: the largest residual that rounding can cause.
        tf32_bound: the same, if the products were computed in TF32.
        scale: <Δbase, D> / ‖D‖².
        off_scale: ‖Δbase - scale·D‖.
        lost: ‖round(base + D) - base - D‖ / ‖D‖, the error of storing the update in this dtype.
        lost_along: -<round(base + D) - base - D, D> / ‖D‖², the part of it that shrinks D.
        lost_expected: what the rounding model expects for `lost`, sqrt(Σ ulp²/12) / ‖D‖.
    """

    step: int
    scaling: float
    dtype: str
    update: float
    residual: float
    bound: float
    tf32_bound: float
    scale: float
    off_scale: float
    lost: float
    lost_along: float
    lost_expected: float


@dataclass(frozen=True)
class Restart:
    """The factors on both sides of a merge; pairs are of the left (rows, r) and right (r, cols).

    Attributes:
        step: the record before the merge.
        cosines: cosine of the old and the new factor, over all entries.
        agreeing: how many of the r components have <new, old> > 0.
        components: how many components were compared; those with <new, old> = 0 are left out.
        kept: <D', D> / ‖D‖², how much of the old product is in the new one.
    """

    step: int
    cosines: tuple[float, float]
    agreeing: tuple[int, int]
    components: tuple[int, int]
    kept: float


def weight_moved(before: Dense, now: Dense, *, merged: bool) -> bool:
    """Whether any entry of the effective weight changed; `merged`: a merge lies between them."""
    change = np.abs(_float64(now) - _float64(before))
    # A merge rounds the weight once more, and that is not a movement.
    allowed = ulp(_float64(now), now.dtype) if merged else 0.0
    return bool((change > allowed).any())


def base_change(before: AdaptedWeight, now: AdaptedWeight) -> tuple[float, float]:
    """‖base(now) - base(before)‖, and the largest value that rounding alone can give it."""
    bases, bound = [], 0.0
    for each in (before, now):
        base = rounded(_float64(each.weight) - each.adapter.product(), each.weight.dtype)
        largest = np.maximum(np.abs(_float64(each.weight)), np.abs(base))
        bound += frobenius_norm(
            ulp(largest, each.weight.dtype) + product_error(each.adapter, tf32=True)
        )
        bases.append(base)
    return frobenius_norm(bases[1] - bases[0]), bound


def merge_between(before: AdaptedWeight, now: AdaptedWeight) -> Merge:
    """The numbers of a merge at `before`, whose D is not zero."""
    dtype = now.weight.dtype
    update = before.adapter.product()
    # Rounding to the base's grid removes the error of storing W = base + D.
    base_before = rounded(_float64(before.weight) - update, dtype)
    base_after = rounded(_float64(now.weight) - now.adapter.product(), dtype)
    expected = rounded(_float64(before.weight), dtype)
    residual = base_after - expected
    # Both were rounded, each within half an ulp of the larger number.
    largest = np.maximum(np.abs(expected), np.abs(base_after))
    half_ulps = ulp(np.maximum(largest, np.abs(_float64(now.weight))), dtype)
    bound, tf32_bound = (
        half_ulps + product_error(before.adapter, tf32=tf32) + product_error(now.adapter, tf32=tf32)
        for tf32 in (False, True)
    )
    norm = frobenius_norm(update)
    scale = 1 + fitted_scale(residual, update)
    lost = expected - base_before - update
    return Merge(
        step=before.step,
        scaling=before.adapter.scale,
        dtype=dtype,
        update=norm,
        residual=frobenius_norm(residual),
        bound=frobenius_norm(bound),
        tf32_bound=frobenius_norm(tf32_bound),
        scale=scale,
        off_scale=frobenius_norm(residual + (1 - scale) * update),
        lost=frobenius_norm(lost) / norm,
        lost_along=-fitted_scale(lost, update),
        lost_expected=float(np.sqrt(rounding_variance(expected, dtype).sum())) / norm,
    )


def restart_between(step: int, old: Factored, new: Factored) -> Restart:
    """How the factors after a merge resemble those before it; both of one shape."""
    # <D', D> = tr((BᵀB')(A'Aᵀ)): the (m, n) products are never formed.
    overlap = np.vdot(old.left.T @ new.left, old.right @ new.right.T)
    size = np.vdot(old.left.T @ old.left, old.right @ old.right.T)
    left = (new.left * old.left).sum(axis=0)  # (r,)
    right = (new.right * old.right).sum(axis=1)  # (r,)
    return Restart(
        step=step,
        cosines=(_cosine(old.left, new.left), _cosine(old.right, new.right)),
        agreeing=(int((left > 0).sum()), int((right > 0).sum())),
        components=(int((left != 0).sum()), int((right != 0).sum())),
        kept=float(new.scale * overlap / (old.scale * size)) if size > 0 else 0.0,
    )


def displacement_beyond_bound(
    first: AdaptedWeight, last: AdaptedWeight, merges: tuple[int, ...]
) -> tuple[int, int, float, float] | None:
    """The displacement's first singular value above what its adapters can explain.

    Returns:
        (step, bound, σ at index bound + 1, the largest that rounding can make it), or None where
        the bound is not below full rank.
    """
    between = sum(first.step <= step < last.step for step in merges)
    # One product per cycle, and one more if the adapter was not zero when recording began.
    nonzero_at_first = first.adapter.left.any() and first.adapter.right.any()
    bound = last.adapter.rank_bound * (between + 1 + bool(nonzero_at_first))
    spectrum = singular_values(_float64(last.weight) - _float64(first.weight))
    if bound >= spectrum.size:
        return None
    noise = 0.0  # every stored weight and every merge rounds once
    for each, times in ((first, 1), (last, 1 + between)):
        error = ulp(_float64(each.weight), each.weight.dtype) / 2
        noise += times * frobenius_norm(error + product_error(each.adapter, tf32=True))
    return last.step, bound, float(spectrum[bound]), noise


def update_beyond_bound(
    before: Dense, now: Dense, bound: int, steps: int
) -> tuple[float, float] | None:
    """The first singular value of an update that its projectors cannot explain.

    Args:
        before: the earlier weight.
        now: the later one.
        bound: the rank that the projectors between the two allow.
        steps: the optimizer steps between them; each rounds the weight, and its own product.

    Returns:
        (σ at index bound + 1, the largest that rounding can make it), or None where the bound is
        not below full rank.
    """
    if bound >= min(now.shape):
        return None
    update = _float64(now) - _float64(before)
    largest = np.maximum(np.abs(_float64(now)), np.abs(_float64(before)))
    stored = (steps + 1) * frobenius_norm(ulp(largest, now.dtype))
    products = bound * steps**0.5 * 2.0**-24 * frobenius_norm(update)
    return float(singular_values(update)[bound]), stored + products


def product_beyond_bound(
    weight: Dense, base: Dense, adapter: Factored
) -> tuple[float, float] | None:
    """The first singular value of W - base that s·B·A cannot explain.

    Returns:
        (At most σ at index r + 1, the largest that rounding can make it), or None where r is full
        rank.
    """
    if adapter.rank_bound >= min(weight.shape):
        return None
    left = _float64(weight) - _float64(base)
    noise = frobenius_norm(ulp(_float64(weight), weight.dtype) + product_error(adapter, tf32=True))
    # σ at r + 1 is the distance to the nearest matrix of rank r, and s·B·A is one.
    beyond = frobenius_norm(left - adapter.product())
    return (beyond if beyond <= noise else float(singular_values(left)[adapter.rank_bound])), noise


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = frobenius_norm(one) * frobenius_norm(other)
    return float(np.vdot(one, other)) / norms if norms > 0 else 0.0


def _float64(matrix: Dense) -> np.ndarray:
    return matrix.values.astype(np.float64)
