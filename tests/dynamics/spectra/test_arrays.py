"""`spectrum` and `singular_values` take arrays and tensors of any real dtype, and name a fault."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.runs.run import Dense

WEIGHT = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def _assert_same(one, other):
    np.testing.assert_array_equal(one.s, other.s)
    assert (one.rows, one.cols, one.rank_bound) == (other.rows, other.cols, other.rank_bound)
    assert (one.error, one.noise_floor) == (other.error, other.noise_floor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_tensor_has_the_spectrum_and_the_floor_of_its_own_dtype(dtype):
    tensor = WEIGHT.to(getattr(torch, dtype))
    values = tensor.double().numpy()
    _assert_same(dy.spectrum(tensor), dy.spectrum(Dense(values, dtype)))
    np.testing.assert_array_equal(dy.singular_values(tensor), dy.singular_values(values))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", ">f8", ">f4", ">f2"])
def test_an_array_has_the_spectrum_and_the_floor_of_its_own_dtype(dtype):
    array = WEIGHT.numpy().astype(dtype)
    _assert_same(dy.spectrum(array), dy.spectrum(Dense(array, array.dtype.name)))
    exact = dy.singular_values(array.astype(np.float64))
    np.testing.assert_array_equal(dy.singular_values(array), exact)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_large_array_is_measured_as_a_weight_of_a_run_is(shape):
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    expected = dy.spectrum(Dense(array, "float32"))
    _assert_same(dy.spectrum(array), expected)
    _assert_same(dy.spectrum(torch.from_numpy(array)), expected)
    assert dy.spectrum(array, rank_bound=7).rank_bound == 7


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint16", "bool", "longdouble"])
def test_integers_and_booleans_are_measured_as_float64(dtype):
    array = np.array([[1, 0, 1], [0, 1, 1]]).astype(dtype)
    expected = dy.spectrum(array.astype(np.float64))
    _assert_same(dy.spectrum(array), expected)
    np.testing.assert_allclose(expected.s, [np.sqrt(3), 1])
    np.testing.assert_array_equal(dy.singular_values(array), expected.s)
    if dtype != "longdouble":
        _assert_same(dy.spectrum(torch.from_numpy(array)), expected)


class ArrayLike:
    def __array__(self, dtype=None, copy=None):
        return np.diag([2.0, 1.0])


@pytest.mark.parametrize(
    "matrix",
    [
        torch.nn.Parameter(torch.diag(torch.tensor([2.0, 1.0]))),
        torch.diag(torch.tensor([2.0, 1.0])).to_sparse(),
        torch.diag(torch.tensor([1.0, 2.0])).flip(0),
        np.diag([2.0, 1.0])[::-1],
        ArrayLike(),
    ],
    ids=["parameter", "sparse", "flipped", "backwards", "array-like"],
)
def test_parameters_views_and_what_numpy_makes_an_array_of_are_taken(matrix):
    np.testing.assert_allclose(dy.singular_values(matrix), [2, 1])
    np.testing.assert_allclose(dy.spectrum(matrix).s, [2, 1])


BAD = {
    "a vector": (np.ones(3), r"two dimensions\); this array has shape \(3,\)"),
    "a number": (np.float64(3), r"two dimensions\); this array has shape \(\)"),
    "a stack": (torch.ones(2, 3, 4), r"two dimensions\); this array has shape \(2, 3, 4\)"),
    "nothing": (np.ones((0, 3)), r"shape \(0, 3\) has no entries"),
    "NaN": (np.array([[1.0, np.nan]]), r"1 x 2 matrix is not finite: its entry \[0, 1\] is nan"),
    "Inf": (torch.tensor([[1.0], [-torch.inf]]).bfloat16(), r"entry \[1, 0\] is -inf"),
    "complex": (np.eye(2) * 1j, "dtype complex128 holds no real numbers"),
    "a complex tensor": (torch.eye(2) * 1j, "dtype complex64 holds no real numbers"),
    "text": (np.array([["a"]]), "dtype str32 holds no real numbers"),
    "objects": (np.array([[None]]), "dtype object holds no real numbers"),
    "a list": ([[1.0, 2.0]], r"found list \[\[1.0, 2.0\]\]. Pass its numbers as an array"),
    "a path": ("run.zarr", r"found str 'run.zarr'. .* use dynamics.analyze"),
    "a pathlib path": (Path("run.zarr"), "found PosixPath .* use dynamics.analyze"),
    "None": (None, "found NoneType None"),
    "a tensor without data": (torch.ones(2, 2, device="meta"), "float32 tensor cannot be read"),
}


@pytest.mark.parametrize("measure", [dy.spectrum, dy.singular_values])
@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said_in_one_line(what, measure):
    matrix, text = BAD[what]
    with pytest.raises(DynamicsError, match=text) as refused:
        measure(matrix)
    assert len(str(refused.value)) < 230


def test_a_dtype_without_a_rounding_model_has_singular_values_but_no_floor():
    tensor = torch.tensor([[2.0]]).to(torch.float8_e5m2fnuz)
    assert dy.singular_values(tensor).tolist() == [2]
    with pytest.raises(DynamicsError, match=r"No rounding model .*'float8_e5m2fnuz'; known: float"):
        dy.spectrum(tensor)
