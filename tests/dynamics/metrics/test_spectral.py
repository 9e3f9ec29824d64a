"""Every metric against an independent float64 computation, closed forms, and its properties."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import brentq

from dynamics import metrics
from dynamics.errors import MissingError
from dynamics.metrics import (
    METRICS,
    above,
    condition_number,
    condition_number_raw,
    effective_rank,
    exceeds_rank_bound,
    frobenius_norm,
    nuclear_norm,
    numerical_rank,
    proportional_effective_rank,
    select_metrics,
    spectral,
    spectral_norm,
    stable_rank,
    top_k_energy,
)
from dynamics.runs.run import Dense, Factored
from dynamics.spectra.spectrum import spectrum

SHAPES = [(96, 96), (384, 96), (128, 384), (1, 7), (7, 1), (5, 5)]


def _entropy_rank(matrix: np.ndarray) -> float:
    s = torch.linalg.svdvals(torch.from_numpy(matrix))
    return float(torch.distributions.Categorical(probs=s).entropy().exp())


def _energy(matrix: np.ndarray, k: int) -> float:
    squared = np.sort(np.linalg.eigvalsh(matrix @ matrix.T))[::-1]
    return float(squared[:k].sum() / np.trace(matrix @ matrix.T))


NODES, WEIGHTS = np.polynomial.legendre.leggauss(100)


def _share_above(theta: float, rows: int, cols: int) -> float:
    # Marchenko & Pastur with λ = m + n + 2√(mn)·cos t, by Gauss-Legendre over 0 < t < theta.
    t = theta * (NODES + 1) / 2
    density = 2 * max(rows, cols) * np.sin(t) ** 2 / np.pi
    return float(
        theta / 2 * np.sum(WEIGHTS * density / (rows + cols + 2 * np.sqrt(rows * cols) * np.cos(t)))
    )


def _random_value(share: float, rows: int, cols: int) -> float:
    theta = brentq(lambda t: _share_above(t, rows, cols) - share, 0, np.pi, xtol=1e-14)
    return float(np.sqrt(rows + cols + 2 * np.sqrt(rows * cols) * np.cos(theta)))


def _per_over_random(matrix: np.ndarray) -> float:
    k = min(matrix.shape)
    s = [_random_value((i + 0.5) / k, *matrix.shape) for i in range(k)]
    return _entropy_rank(matrix) / _entropy_rank(np.diag(s))


def _outliers(matrix: np.ndarray) -> int:
    m, n = matrix.shape
    s = np.linalg.norm(np.linalg.svd(matrix)[2] @ matrix.T, axis=1)[: min(m, n)]
    sigma = np.quantile(s, 0.5) / _random_value(0.5, m, n)
    root = np.sqrt(m - 0.5) + np.sqrt(n - 0.5)
    scale = root * (1 / np.sqrt(m - 0.5) + 1 / np.sqrt(n - 0.5)) ** (1 / 3)
    return int((s**2 > sigma**2 * (root**2 + 3.2724 * scale)).sum())


# An independent way to each number, from the matrix itself and never from our spectrum.
INDEPENDENT = {
    "effective_rank": _entropy_rank,
    "effective_rank_above_floor": _entropy_rank,
    "proportional_effective_rank": lambda w: _entropy_rank(w) / min(w.shape),
    "per_over_random": _per_over_random,
    "rank_bound": lambda w: min(w.shape),
    "rank_bound_use": lambda w: _entropy_rank(w) / min(w.shape),
    "exceeds_rank_bound": lambda w: np.linalg.matrix_rank(w) > min(w.shape),
    "stable_rank": lambda w: np.linalg.norm(w) ** 2 / np.linalg.norm(w, 2) ** 2,
    "numerical_rank": np.linalg.matrix_rank,
    "numerical_rank_raw": np.linalg.matrix_rank,
    "outliers": _outliers,
    "condition_number": np.linalg.cond,
    "condition_number_raw": np.linalg.cond,
    "frobenius_norm": lambda w: np.sqrt((w**2).sum()),
    "spectral_norm": lambda w: np.sqrt(np.linalg.eigvalsh(w.T @ w)[-1]),
    "nuclear_norm": lambda w: np.linalg.norm(w, "nuc"),
    "top_1_energy": lambda w: _energy(w, 1),
    "top_4_energy": lambda w: _energy(w, 4),
    "top_16_energy": lambda w: _energy(w, 16),
}


def test_every_metric_has_an_independent_computation():
    assert set(INDEPENDENT) == set(METRICS)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_agree_with_an_independent_float64_computation(name, shape):
    matrix = np.random.default_rng(0).standard_normal(shape) + 3 * np.eye(*shape)
    measured = METRICS[name].function(spectrum(Dense(matrix, "float64")))
    np.testing.assert_allclose(measured, INDEPENDENT[name](matrix), rtol=1e-10)


def _of(matrix: np.ndarray) -> dict[str, float]:
    measured = spectrum(Dense(np.asarray(matrix, dtype=np.float64), "float64"))
    return {name: float(metric.function(measured)) for name, metric in METRICS.items()}


@pytest.mark.parametrize("shape", [(4, 4), (9, 3), (3, 9)])
def test_the_zero_matrix_has_rank_zero_and_no_condition_number(shape):
    computed = _of(np.zeros(shape))
    for name in ("effective_rank", "proportional_effective_rank", "stable_rank", "numerical_rank"):
        assert computed[name] == 0
    for name in ("frobenius_norm", "spectral_norm", "nuclear_norm", "top_1_energy"):
        assert computed[name] == 0
    for name in ("per_over_random", "outliers", "exceeds_rank_bound"):
        assert computed[name] == 0
    assert np.isnan(computed["condition_number"])
    assert np.isnan(computed["condition_number_raw"])
    assert computed["rank_bound"] == min(shape)


@pytest.mark.parametrize("shape", [(40, 40), (60, 20), (20, 60)])
def test_a_rank_one_matrix_has_rank_one_by_every_measure(shape):
    # Powers of two: the product is exact in float64, so its rank is exactly one.
    matrix = np.outer(2.0 ** (np.arange(shape[0]) % 5), 2.0 ** -(np.arange(shape[1]) % 3))
    computed = _of(matrix)
    assert computed["numerical_rank"] == 1
    assert computed["condition_number"] == 1
    assert computed["condition_number_raw"] == np.inf
    assert computed["effective_rank_above_floor"] == 1
    np.testing.assert_allclose(computed["effective_rank"], 1, rtol=1e-10)
    np.testing.assert_allclose(computed["stable_rank"], 1, rtol=1e-12)
    np.testing.assert_allclose(computed["top_1_energy"], 1, rtol=1e-12)


@pytest.mark.parametrize(("rows", "cols"), [(6, 6), (6, 11), (11, 6)])
def test_the_identity_uses_every_direction_equally(rows, cols):
    computed = _of(np.eye(rows, cols))
    for name in ("effective_rank", "stable_rank", "numerical_rank", "nuclear_norm"):
        np.testing.assert_allclose(computed[name], 6, rtol=1e-14)
    for name in ("proportional_effective_rank", "rank_bound_use", "condition_number"):
        np.testing.assert_allclose(computed[name], 1, rtol=1e-14)
    np.testing.assert_allclose(computed["top_4_energy"], 4 / 6, rtol=1e-14)
    assert computed["top_16_energy"] == 1


def test_exact_zeros_in_the_spectrum_are_neither_noise_nor_directions():
    s = np.array([3.0, 1.0, 0.0, 0.0])
    assert numerical_rank(s, 0.0) == 2
    assert condition_number(s, 0.0) == 3
    assert condition_number_raw(s, 0.0) == np.inf
    p = np.array([0.75, 0.25])
    np.testing.assert_allclose(effective_rank(s), np.exp(-(p * np.log(p)).sum()), rtol=1e-15)
    assert stable_rank(s) == pytest.approx(10 / 9, rel=1e-15)


def test_a_geometric_spectrum_has_its_closed_form_entropy():
    # p_i = (1-q) q^i / (1-q^k): H = -ln((1-q)/(1-q^k)) - ln(q) · Σ i p_i
    q, k = 0.8, 50
    s = q ** np.arange(k)
    mean_index = q / (1 - q) - k * q**k / (1 - q**k)
    entropy = -np.log((1 - q) / (1 - q**k)) - np.log(q) * mean_index
    np.testing.assert_allclose(effective_rank(s), np.exp(entropy), rtol=1e-13)


def test_values_at_the_floor_are_noise_and_values_above_it_are_not():
    s = np.array([4.0, 2.0, 1.0, 0.5])
    assert numerical_rank(s, 1.0) == 2
    assert condition_number(s, 1.0) == 2
    assert above(s, 1.0).tolist() == [4, 2, 0, 0]
    assert np.isnan(condition_number(s, 4.0))


def test_a_rounded_low_rank_product_keeps_its_rank_above_the_floor():
    rng = np.random.default_rng(1)
    product = rng.standard_normal((384, 16)) @ rng.standard_normal((16, 384))
    stored = torch.from_numpy(product).to(torch.bfloat16).double().numpy()
    computed = spectrum(Dense(stored, "bfloat16"))
    value = {name: float(metric.function(computed)) for name, metric in METRICS.items()}
    assert value["effective_rank"] > 16 >= value["effective_rank_above_floor"]
    assert value["numerical_rank"] == 16
    assert value["numerical_rank_raw"] == 384
    assert value["condition_number_raw"] > 100 * value["condition_number"]


def test_a_rounded_product_exceeds_the_bound_of_its_rank_and_the_flag_says_so():
    rng = np.random.default_rng(1)
    # Equal singular values: the exact matrix has effective rank 16, rounding adds to it.
    left, right = (np.linalg.qr(rng.standard_normal((384, 16)))[0] for _ in range(2))
    exact = left @ right.T
    flag = METRICS["exceeds_rank_bound"].function
    stored = Dense(torch.from_numpy(exact).to(torch.bfloat16).double().numpy(), "bfloat16")
    assert flag(spectrum(Dense(exact, "float64"), rank_bound=16)) == 0
    assert flag(spectrum(stored, rank_bound=16)) == 1
    assert numerical_rank(spectrum(stored).s, spectrum(stored).floor) == 16
    assert flag(spectrum(stored)) == 0  # nobody said that it is a product
    assert flag(spectrum(Dense(exact, "float64"), rank_bound=15)) == 1
    assert flag(spectrum(Factored(left, right.T, 2.0, "float32"))) == 0


def test_the_flag_leaves_the_error_of_the_computation_out():
    s = np.array([1.0, 1.0, 1.0, 1e-14])
    assert exceeds_rank_bound(s, 3, 1e-13, 1e-13) == 0
    assert exceeds_rank_bound(s, 3, 0.0, 0.0) == 1
    assert exceeds_rank_bound(s[:3], 2, 0.5, 0.0) == 1
    s = np.array([1.0, 0.01, 0.01])  # effective rank 1.1, numerical rank 3
    np.testing.assert_array_equal(exceeds_rank_bound([s, s], [2, 3], [1e-3, 1e-3], [0, 0]), [1, 0])


def test_the_bound_that_a_caller_knows_is_used_and_reported():
    computed = spectrum(Dense(np.eye(5), "float32"), rank_bound=2)
    assert computed.rank_bound == 2
    assert METRICS["rank_bound_use"].function(computed) == pytest.approx(2.5)
    assert spectrum(Dense(np.eye(5), "float32"), rank_bound=9).rank_bound == 5


STACK = -np.sort(-np.random.default_rng(0).uniform(size=(2, 3, 5)))
STACK[1, 0, 2:], STACK[1, 2] = 0, 0
OF_EACH_MATRIX = {
    "s": STACK,
    "floor": STACK[..., 2] + 0.01,
    "error": STACK[..., 3] / 2,
    "rank_bound": np.array([[1, 2, 3], [4, 5, 5]]),
}
OF_ALL = {"rows": 8, "cols": 5, "k": 2}
FUNCTIONS = [each for each in metrics.__all__ if inspect.isfunction(getattr(spectral, each, None))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_matrix_of_a_stack_is_measured_as_if_it_were_alone(name):
    function = getattr(spectral, name)
    given = inspect.signature(function).parameters.keys()
    own = {each: OF_EACH_MATRIX[each] for each in given & OF_EACH_MATRIX.keys()}
    shared = {each: OF_ALL[each] for each in given & OF_ALL.keys()}
    found = function(**own, **shared)
    for index in np.ndindex(2, 3):
        alone = function(**{each: values[index] for each, values in own.items()}, **shared)
        np.testing.assert_allclose(found[index], alone, rtol=1e-14)


def test_metrics_take_stacks_of_spectra():
    stack = np.array([[[2.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [5.0, 0.0]]])
    floors = np.zeros((2, 2))
    assert effective_rank(stack).shape == (2, 2)
    np.testing.assert_allclose(effective_rank(stack)[0, 1], 2)
    np.testing.assert_array_equal(effective_rank(stack)[1], [0, 1])
    np.testing.assert_array_equal(numerical_rank(stack, floors), [[2, 2], [0, 1]])
    np.testing.assert_array_equal(condition_number(stack, floors), [[2, 1], [np.nan, 1]])
    np.testing.assert_array_equal(condition_number_raw(stack, floors), [[2, 1], [np.nan, np.inf]])
    np.testing.assert_array_equal(top_k_energy(stack, 1), [[0.8, 0.5], [0, 1]])


spectra = hnp.arrays(
    np.float64,
    st.integers(1, 30),
    elements=st.floats(0, 1e6, allow_subnormal=False).map(lambda x: x if x > 1e-6 else 0.0),
).map(lambda s: np.sort(s)[::-1])


@pytest.mark.slow
@given(spectra, st.floats(1e-100, 1e100))
def test_ranks_are_invariant_under_scaling_and_norms_follow_it(s, scale):
    for invariant in (effective_rank, proportional_effective_rank, stable_rank):
        np.testing.assert_allclose(invariant(scale * s), invariant(s), rtol=1e-12)
    for norm in (frobenius_norm, spectral_norm, nuclear_norm):
        np.testing.assert_allclose(norm(scale * s), scale * norm(s), rtol=1e-12)


@pytest.mark.slow
@given(spectra)
def test_ranks_are_ordered_and_norms_are_ordered(s):
    rank = np.count_nonzero(s)
    tolerance = 1 + 1e-12
    assert stable_rank(s) <= rank * tolerance
    assert effective_rank(s) <= rank * tolerance
    assert (effective_rank(s) >= 1 / tolerance) == (rank > 0)
    assert spectral_norm(s) <= frobenius_norm(s) * tolerance <= nuclear_norm(s) * tolerance**2


@pytest.mark.slow
@given(spectra)
def test_energy_grows_with_k_to_one(s):
    shares = [float(top_k_energy(s, k)) for k in range(1, len(s) + 1)]
    assert all(a <= b * (1 + 1e-15) for a, b in pairwise(shares))
    assert shares[-1] == pytest.approx(1 if s[0] > 0 else 0)


def test_an_extreme_scale_neither_overflows_nor_vanishes():
    for scale in (1e-300, 1e300):
        s = scale * np.array([2.0, 1.0, 1.0])
        np.testing.assert_allclose(stable_rank(s), 1.5)
        np.testing.assert_allclose(effective_rank(s), 2**1.5)
        np.testing.assert_allclose(frobenius_norm(s), scale * np.sqrt(6))


def test_metrics_are_selected_by_name_in_the_order_asked_for():
    assert list(select_metrics(["stable_rank", "effective_rank"])) == [
        "stable_rank",
        "effective_rank",
    ]
    assert list(select_metrics(None)) == list(METRICS)
    with pytest.raises(MissingError, match="No metric 'rank'; known: effective_rank"):
        select_metrics(["rank"])
