"""torch computes what NumPy does, within the same bounds, on the CPU and on a GPU."""

import numpy as np
import pytest
import torch

from dynamics.spectra import rounding, torch_spectrum
from dynamics.spectra.gram import gram_error
from dynamics.spectra.numpy_spectrum import EPS
from tests.dynamics.spectra.hard_matrices import HARD, reference
from tests.dynamics.spectra.stored_matrices import DTYPES, weight_with_zeros_and_powers


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("shape", [(384, 96), (256, 256), (128, 384), (4000, 64)])
def test_the_error_bounds_hold(name, shape, device):
    matrix = HARD[name](np.random.default_rng(0), *shape)
    exact, there = reference(matrix), torch.from_numpy(matrix).to(device)
    s, error = torch_spectrum.of_dense(there)
    assert np.abs(s - exact).max() <= error
    squares = torch_spectrum.eigvalsh(torch_spectrum.gram(there))[::-1]
    assert np.abs(squares - exact**2).max() <= gram_error(squares[0], max(shape))
    by_svd = torch_spectrum.singular_values(there)
    assert np.abs(by_svd - exact).max() <= max(shape) * EPS * exact[0]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1.1, np.pi, float(np.float32(0.1))])
@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (8192, 2048), (50304, 32), (50304, 96)])
def test_the_bound_of_gram_matrices_holds_where_all_sums_round_alike(value, shape, device):
    if device.type == "cpu" and shape == (8192, 2048):
        pytest.skip("takes minutes without a GPU")
    there = torch.full(shape, value, dtype=torch.float64, device=device)
    squares = torch_spectrum.eigvalsh(torch_spectrum.gram(there))[::-1]
    exact = np.zeros(min(shape))
    exact[0] = value**2 * shape[0] * shape[1]
    assert np.abs(squares - exact).max() <= gram_error(exact[0], max(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_variances_of_rounding_are_those_of_numpy(dtype, device):
    stored = weight_with_zeros_and_powers(dtype)
    array = (stored if dtype == "float64" else stored.float()).numpy()
    there = torch_spectrum.variance_sums(stored.to(device), dtype)
    for one, other in zip(rounding.variance_sums((array, dtype)), there, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12)
