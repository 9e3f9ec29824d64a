"""How much of a gradient an adapter can follow: the part of it in the adapter's tangent space.

An adapter moves the weight by s·(dB·A + B·dA) to first order. The matrices of that form are the
tangent space {B X + Y A} of the products B·A; a gradient outside of it cannot be followed by any
small change of the factors, whatever the optimizer.
"""

from dataclasses import dataclass

import numpy as np

from dynamics.spectra.numpy_spectrum import singular_values

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Expressibility:
    """Shares of a gradient's energy ‖G‖_F² that changes of an adapter's factors can express.

    Each is between 0 and 1, and NaN where G is zero. They say what can be reached, not what the
    optimizer does: a direction of B or A counts alike however small its singular value.

    Attributes:
        share: ‖P(G)‖_F² / ‖G‖_F² with P the projection onto {L X + Y R}: both factors change.
        left_share: ‖Q_L Q_Lᵀ G‖_F² / ‖G‖_F²: L stays, R changes.
        right_share: ‖G Q_R Q_Rᵀ‖_F² / ‖G‖_F²: R stays, L changes.
        best_share: Σ_{i<=2r} sᵢ² / Σ sᵢ², the largest share for any two factors of rank r.
        best_one_sided_share: Σ_{i<=r} sᵢ² / Σ sᵢ², the largest left_share or right_share.
        random_share: 1 − (1 − r_L/m)(1 − r_R/n), the expected share of random subspaces of the
            dimensions that these have, whatever G is.
        left_rank: r_L, the dimension of the column space of L.
        right_rank: r_R, the dimension of the row space of R.
    """

    share: float
    left_share: float
    right_share: float
    best_share: float
    best_one_sided_share: float
    random_share: float
    left_rank: int
    right_rank: int


def expressibility(gradient: np.ndarray, left: np.ndarray, right: np.ndarray) -> Expressibility:
    """What changes of the factors of left @ right can express of a gradient.

    With Q_L (m, r_L) and Q_R (n, r_R) orthonormal bases of the column space of `left` and the
    row space of `right`, the orthogonal projection onto {L X + Y R} is

        P(G) = Q_L Q_Lᵀ G + G Q_R Q_Rᵀ − Q_L Q_Lᵀ G Q_R Q_Rᵀ

    and its two orthogonal parts Q_L Q_Lᵀ G and (I − Q_L Q_Lᵀ) G Q_R Q_Rᵀ give its norm. A zero
    factor has an empty space: after a reset with B = 0 only G Q_A Q_Aᵀ is left.

    The best share. G − P(G) = (I − P_L) G (I − P_R) differs from G by a matrix of rank <= 2r, so
    that its energy is at least Σ_{i>2r} sᵢ² (Eckart & Young 1936), and L on the left singular
    vectors 1 ... r with R on the right ones r+1 ... 2r reaches it. L and R on the *same* triplets
    1 ... r, the factors of the truncated gradient, overlap and reach Σ_{i<=r} sᵢ² only.

    The tangent space of the matrices of rank r: Vandereycken 2013, "Low-rank matrix completion
    by Riemannian optimization", proposition 2.1.

    Args:
        gradient: G, (m, n).
        left: L, (m, r); B of a LoRA layer whose weight is (out, in).
        right: R, (r, n); A of such a layer. LoRA's scaling changes no share.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """
    gradient, left, right = (np.asarray(x, dtype=np.float64) for x in (gradient, left, right))
    (m, n), r = gradient.shape, left.shape[1]
    if left.shape != (m, r) or right.shape != (r, n):
        raise ValueError(
            f"Expected factors (m, r) and (r, n) of a gradient (m, n), found {left.shape} and "
            f"{right.shape} for {gradient.shape}."
        )
    s = singular_values(gradient)
    q_left, q_right = column_space(left), column_space(right.T)
    ranks = q_left.shape[1], q_right.shape[1]
    random_share = 1 - (1 - ranks[0] / m) * (1 - ranks[1] / n)
    if s[0] == 0:
        nan = float("nan")
        return Expressibility(nan, nan, nan, nan, nan, random_share, *ranks)
    gradient, energy = gradient / s[0], (s / s[0]) ** 2  # nothing overflows
    total = energy.sum()
    through_left = q_left.T @ gradient  # (r_L, n)
    through_right = gradient @ q_right  # (m, r_R)
    only_right = through_right - q_left @ (q_left.T @ through_right)

    def share(*parts: np.ndarray) -> float:
        return min(1.0, float(sum(np.sum(part**2) for part in parts) / total))

    return Expressibility(
        share=share(through_left, only_right),
        left_share=share(through_left),
        right_share=share(through_right),
        best_share=float(energy[: 2 * r].sum() / total),
        best_one_sided_share=float(energy[:r].sum() / total),
        random_share=random_share,
        left_rank=ranks[0],
        right_rank=ranks[1],
    )


def column_space(matrix: np.ndarray) -> np.ndarray:
    """An orthonormal basis (m, rank) of the column space of (m, r) `matrix`.

    The left singular vectors above max(m, r)·2⁻⁵²·s₁, the rounding of their computation in
    float64. The zero matrix has an empty basis, (m, 0).

    Raises:
        ValueError: the matrix holds NaN or Inf.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"Expected finite factors, found NaN or Inf in one of {matrix.shape}.")
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    return u[:, s > max(matrix.shape) * _EPS * s.max(initial=0.0)]
