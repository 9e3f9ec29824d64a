"""Metrics of two matrices against closed forms, dense float64 and scipy."""

import numpy as np
import pytest
import scipy.linalg

from dynamics.directions.pairwise import (
    alignment,
    energy_in_subspaces,
    leading_subspaces,
    principal_angle_cosines,
    subspace_overlap,
)
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored

RNG = np.random.default_rng(5)


def _basis(n, k):
    return np.linalg.qr(RNG.standard_normal((n, k)))[0]


def _factored(m, r, n, scale=1.5):
    return Factored(RNG.standard_normal((m, r)), RNG.standard_normal((r, n)), scale, "float32")


def _dense(values):
    return Dense(np.asarray(values, dtype=np.float64), "float64")


@pytest.mark.parametrize(("n", "j", "k"), [(30, 4, 4), (30, 2, 7), (8, 8, 3)])
def test_principal_angles_agree_with_scipy(n, j, k):
    one, other = _basis(n, j), _basis(n, k)
    expected = np.cos(scipy.linalg.subspace_angles(one, other))
    np.testing.assert_allclose(
        principal_angle_cosines(one, other), np.sort(expected)[::-1], atol=1e-12
    )


def test_overlap_is_one_for_equal_and_contained_subspaces_and_zero_for_orthogonal_ones():
    basis = _basis(20, 6)
    rotated = basis[:, :3] @ _basis(3, 3)
    assert subspace_overlap(basis, rotated) == pytest.approx(1, abs=1e-14)
    assert subspace_overlap(basis[:, :3], basis[:, 3:]) == pytest.approx(0, abs=1e-28)
    assert np.isnan(subspace_overlap(basis, basis[:, :0]))


def test_random_subspaces_overlap_by_their_share_of_the_space():
    overlaps = [subspace_overlap(_basis(64, 8), _basis(64, 4)) for _ in range(300)]
    assert np.mean(overlaps) == pytest.approx(8 / 64, rel=0.05)


@pytest.mark.parametrize(("m", "r", "n"), [(40, 3, 60), (60, 5, 20), (9, 4, 9)])
def test_the_leading_subspaces_of_factors_are_those_of_the_dense_product(m, r, n):
    factored = _factored(m, r, n)
    u, s, vt = np.linalg.svd(factored.product())
    leading = leading_subspaces(factored, k=2)
    np.testing.assert_allclose(leading.s, s[:2], rtol=1e-12)
    np.testing.assert_allclose(leading.left @ leading.left.T, u[:, :2] @ u[:, :2].T, atol=1e-10)
    np.testing.assert_allclose(leading.right @ leading.right.T, vt[:2].T @ vt[:2], atol=1e-10)


def test_directions_below_the_floor_are_left_out():
    matrix = Dense(np.diag([5.0, 3.0, 1e-9, 0.0]), "float32")
    np.testing.assert_allclose(leading_subspaces(matrix, k=4).s, [5, 3])
    assert leading_subspaces(_dense(np.zeros((3, 4))), k=2).left.shape == (3, 0)


def test_the_roundings_of_training_are_no_directions():
    """A rank-2 change over 100 steps, each of which rounded the weight to float32."""
    rng = np.random.default_rng(0)
    before = weight = (0.02 * rng.standard_normal((60, 40))).astype(np.float32)
    directions = np.linalg.qr(rng.standard_normal((40, 2)))[0].T
    for _ in range(100):
        change = 1e-3 * rng.standard_normal((60, 2)) @ directions
        weight = (weight + change).astype(np.float32)
    terms = Dense(weight, "float32"), Dense(before, "float32")
    assert leading_subspaces(Difference(*terms, trained_steps=100), 10).s.size == 2
    assert leading_subspaces(Difference(*terms), 10).s.size == 10


def test_energy_within_subspaces_is_a_share_of_the_squared_norm():
    diagonal = _dense(np.diag([3.0, 2.0, 1.0]))
    identity = np.eye(3)
    assert energy_in_subspaces(diagonal, identity[:, :1], identity) == pytest.approx(9 / 14)
    assert energy_in_subspaces(diagonal, identity, identity) == pytest.approx(1)
    assert energy_in_subspaces(diagonal, identity[:, :1], identity[:, 1:]) == 0
    assert np.isnan(energy_in_subspaces(_dense(np.zeros((3, 3))), identity, identity))
    factored, left, right = _factored(12, 3, 9), _basis(12, 4), _basis(9, 4)
    dense = energy_in_subspaces(_dense(factored.product()), left, right)
    assert energy_in_subspaces(factored, left, right) == pytest.approx(dense, rel=1e-12)


def test_alignment_is_the_cosine_of_the_frobenius_angle():
    one, other = _factored(12, 3, 9), _factored(12, 5, 9, scale=-0.5)
    x, y = one.product(), other.product()
    expected = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    for a in (one, _dense(x)):
        for b in (other, _dense(y)):
            assert alignment(a, b) == pytest.approx(expected, rel=1e-12)
    assert alignment(one, one) == pytest.approx(1)
    assert alignment(_dense(x), _dense(-2 * x)) == pytest.approx(-1)
    assert np.isnan(alignment(_dense(x), _dense(0 * x)))
    with pytest.raises(ValueError, match=r"found \(12, 9\) and \(9, 12\)"):
        alignment(_dense(x), _dense(x.T))
