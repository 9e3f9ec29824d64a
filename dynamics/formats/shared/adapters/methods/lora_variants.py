"""LoRA with more than s·B·A: DoRA, PiSSA, OLoRA, and rows of trained tokens."""

from collections.abc import Mapping

import numpy as np

from dynamics.spectra.rounding import precision, ulp


def dora(
    base: np.ndarray, parts: Mapping[str, np.ndarray], *, scale: float, in_out: bool
) -> np.ndarray:
    """M ∘ V / ‖V‖ with V = W + s·B·A and the norm of each output."""
    a, b, magnitude = parts["A"], parts["B"], parts["magnitude"].reshape(-1, 1)
    delta = scale * (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1))
    flat = base.T if in_out else base.reshape(base.shape[0], -1)
    direction = flat + delta
    weight = magnitude / np.linalg.norm(direction, axis=1, keepdims=True) * direction
    return weight.T if in_out else weight.reshape(base.shape)


def without_principal(
    base: np.ndarray, parts: Mapping[str, np.ndarray], *, rank: int, dtype: str
) -> np.ndarray:
    """The base weight that PiSSA leaves: without its `rank` largest singular components."""
    u, s, v = np.linalg.svd(base, full_matrices=False)
    return _stored(base - (u[:, :rank] * s[:rank]) @ v[:rank], dtype)


def without_basis(
    base: np.ndarray, parts: Mapping[str, np.ndarray], *, rank: int, scale: float, dtype: str
) -> np.ndarray:
    """The base weight that OLoRA leaves: without s·Q·R, the first `rank` columns and rows of QR."""
    q, r = np.linalg.qr(base)
    return _stored(base - scale * (q[:, :rank] @ r[:rank]), dtype)


def with_rows(
    base: np.ndarray, parts: Mapping[str, np.ndarray], *, rows: tuple[int, ...]
) -> np.ndarray:
    """The embedding with the rows of trained tokens in their places."""
    weight = base.copy()
    weight[list(rows)] = parts["rows"]
    return weight


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to a dtype of two bytes, as PEFT stores what is left of the base weight."""
    if precision(dtype)[0] >= 23:
        return values
    step = ulp(values, dtype)
    return np.round(values / step) * step
