"""How much of a gradient an adapter can follow: the part in the adapter's tangent space.

To first order, an adapter moves the weight by s·(dB·A + B·dA). The matrices of this form are the
tangent space {B X + Y A} of the products B·A. No small change of the factors can follow the part of
a gradient outside of it, whatever the optimizer does.
"""

from dataclasses import dataclass

import numpy as np

from dynamics.spectra.numpy_spectrum import EPS, singular_values


@dataclass(frozen=True)
class Expressibility:
    """Shares of a gradient's energy ‖G‖_F² that changes of an adapter's factors can express.

    Each share is between 0 and 1; all but `random_share` are NaN where G is zero. The shares say
    what can be reached, not what the optimizer does: every direction of B or A counts fully,
    however small its singular value.

    Attributes:
        share: both factors change: ‖P(G)‖_F² / ‖G‖_F² with the projection P onto {L X + Y R}.
        left_share: L stays, R changes: ‖Q_L Q_Lᵀ G‖_F² / ‖G‖_F².
        right_share: R stays, L changes: ‖G Q_R Q_Rᵀ‖_F² / ‖G‖_F².
        best_share: the largest share of any two factors of rank r, Σ_{i<=2r} sᵢ² / Σ sᵢ².
        best_one_sided_share: the largest left_share or right_share, Σ_{i<=r} sᵢ² / Σ sᵢ².
        random_share: 1 − (1 − r_L/m)(1 − r_R/n), the expected share of random subspaces of
            dimensions r_L and r_R, whatever G is.
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
    """The shares of a gradient that changes of the factors of left @ right can express.

    Let Q_L (m, r_L) and Q_R (n, r_R) be orthonormal bases of the column space of `left` and of the
    row space of `right`. The orthogonal projection onto {L X + Y R} is

        P(G) = Q_L Q_Lᵀ G + G Q_R Q_Rᵀ − Q_L Q_Lᵀ G Q_R Q_Rᵀ

    Its norm follows from its two orthogonal parts Q_L Q_Lᵀ G and (I − Q_L Q_Lᵀ) G Q_R Q_Rᵀ. A zero
    factor has an empty space: after a reset with B = 0, only G Q_A Q_Aᵀ is left.

    The best share: G − P(G) = (I − P_L) G (I − P_R) differs from G by a matrix of rank <= 2r, so
    its energy is at least Σ_{i>2r} sᵢ² (Eckart & Young 1936). It is exactly that where L spans the
    left singular vectors 1 ... r and R the right singular vectors r+1 ... 2r. The factors of the
    truncated gradient do not get there: L and R then belong to the *same* triplets 1 ... r, they
    overlap, and the share is only Σ_{i<=r} sᵢ² / Σ sᵢ².

    The tangent space of the matrices of rank r is that of Vandereycken 2013, "Low-rank matrix
    completion by Riemannian optimization", proposition 2.1.

    Args:
        gradient: G, (m, n), computed with in float64.
        left: L, (m, r): B of a LoRA layer whose weight is stored (out, in).
        right: R, (r, n): A of such a layer. LoRA's scaling changes no share.

    Raises:
        ValueError: the shapes do not fit, or a number is NaN or Inf.

    Example:
        The gradient diag(2, 1) and factors of rank 1 that both have its leading direction:

        >>> e1 = np.array([[1.0], [0.0]])
        >>> shares = expressibility(np.diag([2.0, 1.0]), left=e1, right=e1.T)
        >>> round(shares.share, 12), shares.best_share  # 4/5; two directions would be all
        (0.8, 1.0)
        >>> shares.random_share  # 1 - (1 - 1/2)(1 - 1/2)
        0.75
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
    """An orthonormal basis of the column space of a matrix.

    Args:
        matrix: (m, r), computed with in float64.

    Returns:
        (m, rank) float64: the left singular vectors whose singular values exceed
        max(m, r)·2⁻⁵²·s₁, the rounding of their computation. The zero matrix has an empty basis,
        (m, 0).

    Raises:
        ValueError: the matrix holds NaN or Inf.

    Example:
        >>> column_space(np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])).shape
        (3, 1)
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"Expected finite factors, found NaN or Inf in one of {matrix.shape}.")
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    return u[:, s > max(matrix.shape) * EPS * s.max(initial=0.0)]
