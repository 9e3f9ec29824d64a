"""How far rounding alone can move a stored sum W + s·B·A: strict bounds, not expected sizes.

Every threshold of the audit that compares two stored weights comes from here. A stored number lies
within half an ulp of the computed one. A computed product s·B·A lies within r·u·s·|B||A| of the
exact one (Higham 2002, "Accuracy and Stability of Numerical Algorithms", eq. 3.13), where u is the
unit roundoff of the dtype that computed it. The norms of such bounds add up. A difference above
their sum is therefore not rounding, whatever the distribution of the errors is.
"""

import numpy as np

from dynamics.runs.run import Factored
from dynamics.spectra.rounding import ulp

# Stored dtype -> unit roundoff of the dtype in which PEFT multiplies the factors. Factors of lower
# precision are multiplied in float32: on a CPU because PEFT does so, on a GPU by the tensor cores.
_UNIT_ROUNDOFF = {"float64": 2.0**-53}
_FLOAT32_UNIT_ROUNDOFF = 2.0**-24
# TF32 rounds both factors to 10 bits: 2^-11 each (NVIDIA A100 whitepaper, 2020).
_TF32_PRODUCT = 2.0**-10


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest numbers of `dtype`, ties to even, as float64, in the shape of `values`."""
    values = np.asarray(values, dtype=np.float64)
    spacing = ulp(values, dtype)
    spacing[spacing == 0] = 1.0  # zero stays zero
    return np.round(values / spacing) * spacing


def product_error(adapter: Factored, *, tf32: bool = False) -> np.ndarray:
    """Bound on |computed - exact| of each entry of s·B·A, (rows, cols) float64.

    The bound is 2·r·u·s·|B||A| (once for the product of the training, once for the product that
    the audit computes) plus one ulp of the product in the dtype of the factors (half for the
    product, half for its scaling). With `tf32`, it also covers what products of float32 factors
    lose on a GPU that may use TF32.
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
    """The c that minimises ‖change - c·update‖: <change, update> / ‖update‖²."""
    return float(np.vdot(update, change) / np.vdot(update, update))
