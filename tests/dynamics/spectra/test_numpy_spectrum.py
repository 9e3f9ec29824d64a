"""How the singular values of a stored matrix are computed: the rules, and where they change over.

Each rule is told by the form of the bound that it leaves: δ/s_k of a Gram matrix, m·2⁻⁵²·σ₁ of an
SVD. NumPy and torch follow the same rules.
"""

import numpy as np
import pytest
import torch

from dynamics.runs.run import Dense
from dynamics.spectra import numpy_spectrum, torch_spectrum
from tests.dynamics.spectra.hard_matrices import reference

ROWS, COLS = 384, 96
# Where a Gram matrix of this shape gives the smallest singular value to just 1e-3, over σ₁:
# 16·√m·2⁻⁵³·σ₁²/s = 1e-3·s.
TURN = np.sqrt(16 * np.sqrt(ROWS) * 2.0**-53 / 1e-3)

ways = pytest.mark.parametrize(
    "of_dense",
    [
        lambda matrix: numpy_spectrum.of_dense(Dense(matrix, "float64")),
        lambda matrix: torch_spectrum.of_dense(torch.from_numpy(matrix)),
    ],
    ids=["numpy", "torch"],
)


def _ending_in(smallest):
    """A matrix of the singular values 2, ..., 2, 2·smallest, in random directions."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((side, COLS)))[0] for side in (ROWS, COLS))
    return left * np.append(np.full(COLS - 1, 2.0), 2 * smallest) @ right.T


def _bounds(s, rows):
    """Of a Gram matrix, and of an SVD."""
    return 16 * np.sqrt(rows) * 2.0**-53 * s[0] ** 2 / s[-1], rows * 2.0**-52 * s[0]


@ways
def test_a_gram_matrix_stands_in_while_it_gives_the_smallest_value_to_a_thousandth(of_dense):
    matrix = _ending_in(1.2 * TURN)
    s, error = of_dense(matrix)
    by_gram, by_svd = _bounds(s, ROWS)
    assert error == pytest.approx(by_gram, rel=1e-6)
    assert error > 1e3 * by_svd
    assert 0.5e-3 < error / s[-1] <= 1e-3  # a tolerance half as large would refuse it
    exact = reference(matrix)[-1]  # to 1e-8 of itself
    assert abs(s[-1] - exact) <= min(error, 1e-3 * exact)


@ways
def test_an_svd_is_taken_where_a_gram_matrix_does_not_give_it_to_a_thousandth(of_dense):
    matrix = _ending_in(0.8 * TURN)
    s, error = of_dense(matrix)
    by_gram, by_svd = _bounds(s, ROWS)
    assert error == pytest.approx(by_svd, rel=1e-12)
    assert 1e-3 < by_gram / s[-1] < 2e-3  # a tolerance twice as large would have let it pass
    exact = reference(matrix)[-1]
    assert abs(s[-1] - exact) <= 2 * by_svd < 1e-6 * exact


@ways
@pytest.mark.parametrize(("rows", "small"), [(256, True), (257, False)])
def test_small_matrices_have_the_accuracy_of_an_svd(of_dense, rows, small):
    matrix = np.random.default_rng(0).standard_normal((rows, 128))
    s, error = of_dense(matrix)
    by_gram, by_svd = _bounds(s, rows)
    assert error == pytest.approx(by_svd if small else by_gram, rel=1e-9)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (300, 30)])
def test_what_the_faster_driver_cannot_measure_the_slower_one_does(shape, monkeypatch):
    matrix = np.random.default_rng(0).standard_normal(shape)

    def fail(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fail)
    found = numpy_spectrum.singular_values(matrix)
    # An independent way: the roots of the eigenvalues of the smaller of WᵀW and WWᵀ.
    smaller = matrix.T @ matrix if shape[0] > shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(found, np.sqrt(np.linalg.eigvalsh(smaller)[::-1]), rtol=1e-11)
