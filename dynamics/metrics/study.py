"""Spectral numbers as the code of a study of low-rank pretraining computes them.

Its authors compare GaLore, Fira, CoLA, SLTrain and ReLoRA with full-rank training
(arXiv 2605.13652; github.com/NamrataRShivagunde/low-rank-geometry, `5_ranks.py` and
`5_ranks_updates.py`). They load every weight as bfloat16 and take its singular values in float32.
Neither an error nor a noise floor is considered, so `study_rank` is nearly always full. These
numbers are here to be held beside ours, see docs/reproduction.md.
"""

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored, Spectrum

# Whatever exceeds it counts in `study_rank` and `study_effective_rank`.
_TOLERANCE = 1e-12
_THRESHOLD = 0.1


def study_spectrum(matrix: Dense | Factored | Difference) -> Spectrum:
    """The singular values in float32 of a matrix whose terms were rounded to bfloat16.

    The terms of a difference are rounded one by one and subtracted in float32.

    Args:
        matrix: (m, n), finite.

    Returns:
        A `Spectrum` whose `s` (min(m, n),) float64 holds the float32 numbers. There is no floor:
        `error` and `noise_floor` are zero. `s` is empty for a product of factors, which the study
        never multiplies out.

    Example:
        >>> study_spectrum(Dense(np.diag([1.001, 0.5]), "float32")).s  # bfloat16 has 8 bits
        array([1. , 0.5])
    """
    import torch

    def loaded(term: Dense) -> torch.Tensor:
        return torch.tensor(term.values).to(torch.bfloat16).float()

    if isinstance(matrix, Factored):
        s = np.empty(0)
    elif isinstance(matrix, Difference):
        s = torch.linalg.svdvals(loaded(matrix.now) - loaded(matrix.before)).double().numpy()
    else:
        s = torch.linalg.svdvals(loaded(matrix)).double().numpy()
    rows, cols = matrix.shape
    return Spectrum(s, rows, cols, min(rows, cols), 0.0, 0.0)


def study_rank(s: np.ndarray) -> np.ndarray:
    """How many singular values exceed 1e-12: for stored weights, nearly always all of them.

    Args:
        s: (..., k) singular values, descending.

    Returns:
        (...) float64.

    Example:
        >>> float(study_rank(np.array([1.0, 1e-8])))
        2.0
    """
    return np.count_nonzero(s > _TOLERANCE, axis=-1).astype(np.float64)


def study_effective_rank(s: np.ndarray) -> np.ndarray:
    """exp(-Σ p ln p), p = s / Σ s, over singular values above 1e-12; 0 where there is none.

    Args:
        s: (..., k) singular values, descending.

    Returns:
        (...) float64.

    Example:
        >>> float(study_effective_rank(np.array([3.0, 3.0, 0.0])))
        2.0
    """
    s = np.where(s > _TOLERANCE, s, 0.0)
    total = s.sum(-1)
    p = s / np.where(total > 0, total, 1.0)[..., None]
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return np.where(total > 0, np.exp(entropy), 0.0)


def study_stable_rank(s: np.ndarray) -> np.ndarray:
    """Σ s² / s₁² over singular values above 1e-12; 0 where there is none.

    Args:
        s: (..., k) singular values, descending.

    Returns:
        (...) float64.

    Example:
        >>> float(study_stable_rank(np.array([2.0, 1.0])))
        1.25
    """
    s = np.where(s > _TOLERANCE, s, 0.0)
    return (s**2).sum(-1) / np.where(s[..., 0] > 0, s[..., 0], 1.0) ** 2


def study_spectral_gap(s: np.ndarray) -> np.ndarray:
    """(s₁ - s₂) / s₁ over singular values above 1e-12: 1 where there is one, 0 where there is none.

    Args:
        s: (..., k) singular values, descending.

    Returns:
        (...) float64.

    Example:
        >>> float(study_spectral_gap(np.array([4.0, 1.0])))
        0.75
    """
    s = np.where(s > _TOLERANCE, s, 0.0)
    second = s[..., 1] if s.shape[-1] > 1 else np.zeros(s.shape[:-1])
    return (s[..., 0] - second) / np.where(s[..., 0] > 0, s[..., 0], 1.0)


def study_count_above_0_1(s: np.ndarray) -> np.ndarray:
    """How many singular values exceed 0.1, whatever the size of the matrix.

    Args:
        s: (..., k) singular values, descending.

    Returns:
        (...) float64.

    Example:
        >>> float(study_count_above_0_1(np.array([2.0, 0.2, 0.02])))
        2.0
    """
    return np.count_nonzero(s > _THRESHOLD, axis=-1).astype(np.float64)
