"""Shares of a gradient in an adapter's tangent space, against dense float64 least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamics.directions.adapter_subspace import column_space, expressibility

SHAPES = [(12, 9, 2), (9, 12, 3), (10, 10, 1), (7, 8, 4), (6, 5, 5)]


def _random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _least_squares_shares(gradient, left, right):
    """The shares by solving for X and Y: vec(L X + Y R) is linear in vec(X) and vec(Y)."""
    (m, n), r = gradient.shape, left.shape[1]
    of_x = np.stack([(left @ e.reshape(r, n)).ravel() for e in np.eye(r * n)], axis=1)
    of_y = np.stack([(e.reshape(m, r) @ right).ravel() for e in np.eye(m * r)], axis=1)
    shares = []
    for columns in (np.hstack([of_x, of_y]), of_x, of_y):
        solution = np.linalg.lstsq(columns, gradient.ravel(), rcond=1e-12)[0]
        shares.append(np.sum((columns @ solution) ** 2) / np.sum(gradient**2))
    return shares


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("deficient", ["none", "left", "right", "left_is_zero", "dependent"])
def test_the_shares_are_those_of_dense_least_squares(m, n, r, deficient):
    gradient, left, right = _random(m, n), _random(m, r, seed=1), _random(r, n, seed=2)
    if deficient == "left":
        left[:, 0] = 0
    elif deficient == "right":
        right[-1] = 0
    elif deficient == "left_is_zero":
        left[:] = 0
    elif deficient == "dependent":
        left[:, -1] = left[:, 0]
    computed = expressibility(gradient, left, right)
    expected = _least_squares_shares(gradient, left, right)
    np.testing.assert_allclose(
        [computed.share, computed.left_share, computed.right_share],
        expected,
        rtol=1e-11,
        atol=1e-14,
    )
    assert computed.left_rank == np.linalg.matrix_rank(left)
    assert computed.right_rank == np.linalg.matrix_rank(right)


def test_after_a_reset_only_the_row_space_of_a_is_left():
    gradient, a = _random(8, 6), _random(2, 6, seed=1)
    q = np.linalg.qr(a.T)[0]
    computed = expressibility(gradient, np.zeros((8, 2)), a)
    expected = np.linalg.norm(gradient @ q @ q.T) ** 2 / np.linalg.norm(gradient) ** 2
    np.testing.assert_allclose(computed.share, expected, rtol=1e-13)
    assert (computed.left_share, computed.right_share) == (0, computed.share)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_the_best_share_is_reached_and_never_exceeded(m, n, r):
    gradient = _random(m, n)
    u, s, vt = np.linalg.svd(gradient, full_matrices=False)
    energy = np.cumsum(s**2) / np.sum(s**2)
    same = expressibility(gradient, u[:, :r], vt[:r])
    np.testing.assert_allclose(same.share, energy[r - 1], rtol=1e-12)
    np.testing.assert_allclose(same.best_one_sided_share, same.left_share, rtol=1e-12)
    np.testing.assert_allclose(same.best_share, energy[min(2 * r, s.size) - 1], rtol=1e-12)
    if 2 * r <= s.size:
        next_ones = expressibility(gradient, u[:, :r], vt[r : 2 * r])
        np.testing.assert_allclose(next_ones.share, next_ones.best_share, rtol=1e-12)
    # Gradient ascent over all pairs of subspaces finds nothing better.
    computed = _best_by_search(gradient, r)
    assert computed <= same.best_share * (1 + 1e-9)
    assert computed >= same.best_share * (1 - 1e-2)


def _best_by_search(gradient, r, restarts=4, steps=300):
    torch.manual_seed(0)
    g = torch.from_numpy(gradient)
    best = 0.0
    for _ in range(restarts):
        factors = [torch.randn(size, r, dtype=torch.float64) for size in g.shape]
        for factor in factors:
            factor.requires_grad_(True)
        optimizer = torch.optim.Adam(factors, lr=0.05)
        for _ in range(steps):
            q, p = (torch.linalg.qr(factor)[0] for factor in factors)
            rest = g - q @ (q.T @ g)
            residual = (rest - rest @ p @ p.T).pow(2).sum()
            optimizer.zero_grad()
            residual.backward()
            optimizer.step()
        best = max(best, 1 - float(residual.detach() / g.pow(2).sum()))
    return best


@pytest.mark.slow
def test_random_factors_express_the_random_share_on_average():
    rng = np.random.default_rng(0)
    gradient = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 9))  # not isotropic
    shares = []
    for _ in range(2000):
        computed = expressibility(
            gradient, rng.standard_normal((12, 2)), rng.standard_normal((2, 9))
        )
        shares.append(computed.share)
    assert computed.random_share == pytest.approx(1 - (1 - 2 / 12) * (1 - 2 / 9))
    assert np.mean(shares) == pytest.approx(
        computed.random_share, abs=4 * np.std(shares) / 2000**0.5
    )


@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(1e-150, 1e150), st.floats(1e-6, 1e6))
def test_scales_do_not_matter_and_shares_are_ordered(seed, r, scale, factor_scale):
    gradient, left, right = _random(6, 5, seed=seed), _random(6, r, seed=1), _random(r, 5, seed=2)
    computed = expressibility(scale * gradient, factor_scale * left, right)
    plain = expressibility(gradient, left, right)
    assert computed.share == pytest.approx(plain.share, rel=1e-9)
    assert max(computed.left_share, computed.right_share) <= computed.share * (1 + 1e-12)
    assert computed.share <= min(1.0, computed.left_share + computed.right_share) * (1 + 1e-12)
    assert computed.share <= computed.best_share * (1 + 1e-12) <= 1 + 1e-9


def test_a_zero_gradient_has_no_shares_and_wrong_input_is_refused():
    zero = expressibility(np.zeros((4, 3)), _random(4, 2), _random(2, 3))
    assert np.isnan([zero.share, zero.left_share, zero.best_share]).all()
    assert zero.left_rank == 2
    with pytest.raises(ValueError, match=r"found \(3, 2\) and \(2, 3\) for \(4, 3\)"):
        expressibility(_random(4, 3), _random(3, 2), _random(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        column_space(np.full((3, 2), np.nan))
