"""Methods that multiply the base weight by a rotation of its inputs: OFT, BOFT, HRA."""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from dynamics.formats.shared.adapters.methods.place import NotComputed, Place, Recipe


def oft(at: Place) -> Recipe:
    """W · blockdiag(R)ᵀ; R is a Cayley transform of the skew-symmetric Q, or a series for it."""
    parts = at.parts("oft_R")
    if at.in_out:
        raise NotComputed("OFT adapters on Conv1D, which PEFT cannot merge")
    by_series, projected = at.flag("use_cayley_neumann"), at.flag("coft")
    return Recipe(
        parts,
        partial(
            _oft,
            is_shared=at.flag("block_share"),
            terms=int(at.number("num_cayley_neumann_terms")) if by_series else None,
            radius=at.number("eps") if projected else None,
        ),
    )


def _oft(
    base: np.ndarray,
    parts: Mapping[str, np.ndarray],
    *,
    is_shared: bool,
    terms: int | None,
    radius: float | None,
) -> np.ndarray:
    stored = parts["oft_R"]  # (blocks, entries above the diagonal)
    size = math.isqrt(2 * stored.shape[1]) + 1
    q = np.zeros((stored.shape[0], size, size))
    rows, cols = np.triu_indices(size, 1)
    q[:, rows, cols] = stored
    q -= q.transpose(0, 2, 1)
    if radius is not None:
        longest = radius / math.sqrt(q.shape[0])
        norms = np.linalg.norm(q, axis=(1, 2), keepdims=True)
        q = np.where(norms <= longest, q, longest * q / norms)
    r = _cayley(q) if terms is None else _series(q, terms)
    blocks = base.reshape(base.shape[0], -1, size)
    if is_shared:
        r = np.repeat(r, blocks.shape[1], axis=0)
    return _rotated(blocks, r).reshape(base.shape)


def boft(at: Place) -> Recipe:
    """S ∘ (W · blockdiag(R)ᵀ) with R the Cayley transform of (Q - Qᵀ) / 2; one butterfly factor."""
    parts = at.parts("boft_R", "boft_s")
    if at.in_out:
        raise NotComputed("BOFT adapters on Conv1D, which PEFT cannot merge")
    if parts["boft_R"].shape[:1] != (1,):
        raise NotComputed("BOFT adapters of several butterfly factors")
    return Recipe(parts, partial(_boft))


def _boft(base: np.ndarray, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    q = parts["boft_R"][0]
    r = _cayley((q - q.transpose(0, 2, 1)) / 2)
    rotated = _rotated(base.reshape(base.shape[0], -1, q.shape[-1]), r)
    scaled: np.ndarray = rotated.reshape(base.shape[0], -1) * parts["boft_s"].reshape(-1, 1)
    return scaled.reshape(base.shape)


def hra(at: Place) -> Recipe:
    """W · H, H a product of Householder reflections, orthogonalised first where the config says."""
    if at.in_out or len(at.shape) != 2:
        raise NotComputed("HRA adapters on layers other than Linear")
    return Recipe(at.parts("hra_u"), partial(_hra, orthogonal=at.flag("apply_GS")))


def _hra(base: np.ndarray, parts: Mapping[str, np.ndarray], *, orthogonal: bool) -> np.ndarray:
    vectors: list[np.ndarray] = []
    weight = base
    for vector in parts["hra_u"].T:
        for other in vectors if orthogonal else ():
            vector = vector - (other @ vector) * other
        vector = vector / np.linalg.norm(vector)
        vectors.append(vector)
        weight = weight - 2 * np.outer(weight @ vector, vector)
    return weight


def _rotated(blocks: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Each block of inputs of (out, blocks, size) times the transpose of its rotation."""
    if blocks.shape[1] != r.shape[0]:
        raise ValueError(f"{r.shape[0]} rotations for {blocks.shape[1]} blocks of inputs")
    rotated: np.ndarray = np.einsum("obj,bij->obi", blocks, r)
    return rotated


def _cayley(q: np.ndarray) -> np.ndarray:
    """(I - Q)(I + Q)⁻¹ of each block."""
    identity = np.eye(q.shape[-1])
    solved = np.linalg.solve((identity + q).transpose(0, 2, 1), (identity - q).transpose(0, 2, 1))
    return solved.transpose(0, 2, 1)


def _series(q: np.ndarray, terms: int) -> np.ndarray:
    """I + 2 (Q + Q² + ...) with a last term of weight 1, as PEFT adds it up."""
    if not 1 <= terms <= 1000:
        raise ValueError(f"a series of {terms} terms")
    r = np.tile(np.eye(q.shape[-1]), (q.shape[0], 1, 1))
    if terms > 1:
        r = r + 2 * q
    if terms > 2:
        power = q @ q
        r = r + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            r = r + 2 * power
        r = r + power @ q
    return r
