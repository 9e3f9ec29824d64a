"""How far rounding alone can move a stored sum W + s·B·A: bounds that hold, not expectations.

Every threshold of the audit that compares two stored weights comes from here. A stored number is
within half an ulp of what was computed, and a computed product s·B·A within
r·u·s·|B||A| of the exact one (Higham 2002, "Accuracy and Stability of Numerical Algorithms",
eq. 3.13; u the unit roundoff of the dtype that it was computed in). The norms of such bounds add,
so a difference above their sum cannot be rounding, whatever the distribution of the errors.
"""

import numpy as np

from dynamics.runs.run import Factored
from dynamics.spectra.noise import ulp

# Unit roundoff of the dtype in which PEFT multiplies factors of a stored dtype. Lower precisions
# are multiplied in float32, on a CPU by PEFT's decision and on a GPU by the tensor cores.
_UNIT_ROUNDOFF = {"float64": 2.0**-53}
_FLOAT32_UNIT_ROUNDOFF = 2.0**-24
# TF32 rounds both factors to 10 bits: 2^-11 each (NVIDIA A100 whitepaper, 2020).
_TF32_PRODUCT = 2.0**-10


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of `dtype`, ties to even, as float64, the shape of `values`."""
    values = np.asarray(values, dtype=np.float64)
    spacing = ulp(values, dtype)
    spacing[spacing == 0] = 1.0  # zero stays zero
    return np.round(values / spacing) * spacing


def product_error(adapter: Factored, *, tf32: bool = False) -> np.ndarray:
    """Bound on |computed - exact| of each entry of s·B·A, (rows, cols).

    Twice r·u·s·|B||A|, for the training's product and for ours, and one ulp of the product in the
    factors' dtype: half for the product itself and half for its scaling. With `tf32`, what
    products of float32 factors lose on a GPU that was allowed TF32 comes on top.
    """
    left, right = (np.abs(each).astype(np.float64) for each in (adapter.left, adapter.right))
    size = abs(adapter.scale) * (left @ right)  # |s|·|B||A|
    unit = _UNIT_ROUNDOFF.get(adapter.dtype, _FLOAT32_UNIT_ROUNDOFF)
    bound = 2 * adapter.rank_bound * unit * size + ulp(adapter.product(), adapter.dtype)
    if tf32 and adapter.dtype == "float32":
        bound = bound + _TF32_PRODUCT * size
    return bound


def frobenius_norm(matrix: np.ndarray) -> float:
    """sqrt(Σ x²), float64."""
    return float(np.linalg.norm(matrix))


def fitted_scale(change: np.ndarray, update: np.ndarray) -> float:
    """The c for which c·update fits `change` best: <change, update> / ‖update‖²."""
    return float(np.vdot(update, change) / np.vdot(update, update))
