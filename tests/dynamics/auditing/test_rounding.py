"""Rounding of stored dtypes and of products, against torch."""

import numpy as np
import pytest

from dynamics.auditing.rounding import product_error, rounded
from dynamics.runs.run import Factored


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounded_is_what_torch_stores(dtype):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(2000) * np.logspace(-6, 3, 2000)
    values[:3] = 0.0, 1.0, -1.5
    stored = torch.from_numpy(values).to(getattr(torch, dtype)).double().numpy()
    np.testing.assert_array_equal(rounded(values, dtype), stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_computed_product_is_further_from_the_exact_one_than_its_bound(dtype):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    for rank in (1, 8, 64):
        left = torch.randn(40, rank, generator=generator).to(getattr(torch, dtype))
        right = torch.randn(rank, 30, generator=generator).to(getattr(torch, dtype))
        computed = (0.3 * (left @ right)).double().numpy()
        exact = Factored(left.float().numpy(), right.float().numpy(), 0.3, dtype)
        error = np.abs(computed - exact.product())
        bound = product_error(exact)
        assert (error <= bound).all()
        assert error.max() > bound[error == error.max()].min() / (40 + 40 * rank)


def test_tf32_widens_the_bound_of_float32_factors_only():
    factors = np.full((2, 3), 0.5, np.float32), np.full((3, 2), 0.25, np.float32)
    product_size = 2 * 3 * 0.5 * 0.25  # |s|·|B||A|
    adapter = Factored(*factors, -2.0, "float32")
    widened = product_error(adapter, tf32=True) - product_error(adapter)
    np.testing.assert_allclose(widened, 2.0**-10 * product_size, rtol=1e-9)
    adapter = Factored(*factors, -2.0, "bfloat16")
    np.testing.assert_array_equal(product_error(adapter, tf32=True), product_error(adapter))
