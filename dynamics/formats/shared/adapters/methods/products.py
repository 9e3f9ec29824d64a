"""Methods that add products to the base weight: LoHa, LoKr, VeRA, C3A."""

from collections.abc import Mapping
from functools import partial

import numpy as np

from dynamics.formats.shared.adapters.methods.place import NotComputed, Place, Recipe

_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def loha(at: Place) -> Recipe:
    """W + α/r (w1a w1b) ∘ (w2a w2b); for kernels the two factors are Tucker products."""
    cores = ("hada_t1", "hada_t2") if "hada_t1" in at.layer.parts else ()
    return Recipe(at.parts(*_HADAMARD, *cores), partial(_loha, scale=at.scale()))


def _loha(base: np.ndarray, parts: Mapping[str, np.ndarray], *, scale: float) -> np.ndarray:
    w1a, w1b, w2a, w2b = (parts[name] for name in _HADAMARD)
    if "hada_t1" in parts:
        product = _tucker(parts["hada_t1"], w1a, w1b) * _tucker(parts["hada_t2"], w2a, w2b)
    else:
        product = (w1a @ w1b) * (w2a @ w2b)
    return base + scale * product.reshape(base.shape)


def lokr(at: Place) -> Recipe:
    """W + α/r w1 ⊗ w2, where each factor is stored whole or as a product."""
    stored = at.layer.parts
    names: list[str] = []
    for factor in ("lokr_w1", "lokr_w2"):
        names += [factor] if factor in stored else [f"{factor}_a", f"{factor}_b"]
    names += ["lokr_t2"] if "lokr_t2" in stored else []
    return Recipe(at.parts(*names), partial(_lokr, scale=at.scale()))


def _lokr(base: np.ndarray, parts: Mapping[str, np.ndarray], *, scale: float) -> np.ndarray:
    one, two = (_whole(parts, factor) for factor in ("lokr_w1", "lokr_w2"))
    if two.ndim == 4:
        one = one[:, :, None, None]
    return base + scale * np.kron(one, two).reshape(base.shape)


def _whole(parts: Mapping[str, np.ndarray], factor: str) -> np.ndarray:
    if factor in parts:
        return parts[factor]
    a, b = parts[f"{factor}_a"], parts[f"{factor}_b"]
    if factor == "lokr_w2" and "lokr_t2" in parts:
        return _tucker(parts["lokr_t2"], a, b)
    return a @ b


def vera(at: Place) -> Recipe:
    """W + diag(λ_b) B diag(λ_d) A; all layers use the first rows and columns of one B and A."""
    parts = at.parts("vera_lambda_b", "vera_lambda_d")
    if not {"vera_A", "vera_B"} <= set(at.shared):
        raise NotComputed("VERA adapters whose projections were not saved (save_projection=False)")
    parts |= {name: at.shared[name] for name in ("vera_A", "vera_B")}
    return Recipe(parts, partial(_vera, in_out=at.in_out))


def _vera(base: np.ndarray, parts: Mapping[str, np.ndarray], *, in_out: bool) -> np.ndarray:
    out, inputs = base.shape[::-1] if in_out else base.shape
    left = parts["vera_lambda_b"][:, None] * parts["vera_B"][:out]
    delta: np.ndarray = left @ (parts["vera_lambda_d"][:, None] * parts["vera_A"][:, :inputs])
    return base + (delta.T if in_out else delta)


def c3a(at: Place) -> Recipe:
    """W + a matrix of circulant blocks, over the number of inputs."""
    return Recipe(at.parts("c3a_kernel"), partial(_c3a))


def _c3a(base: np.ndarray, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    kernel = parts["c3a_kernel"]  # (out / b, in / b, b)
    index = np.arange(kernel.shape[-1])
    blocks = kernel[:, :, (index[None, :] - index[:, None]) % index.size]
    return base + blocks.transpose(0, 2, 1, 3).reshape(base.shape) / base.shape[-1]


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = np.einsum("ijkl,ip,jr->prkl", core, a, b)
    return kernel
