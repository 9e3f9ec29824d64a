"""Differences of stored weights, and the rounding that they have behind them."""

import numpy as np
import pytest
import torch

from dynamics.metrics import effective_rank, numerical_rank
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored
from dynamics.spectra.spectrum import spectrum


def _merged(dtype, cycles, rank, shape, seed=0):
    """A weight before and after merging `cycles` adapters, each sum rounded to `dtype`.

    Returns both in float64, and the exact sum of the adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape
    weight = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    first, exact = weight.double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(cycles):
        b = 0.1 * torch.randn((rows, rank), generator=generator).double()
        a = 0.1 * torch.randn((rank, cols), generator=generator).double()
        weight = (weight.double() + b @ a).to(dtype)
        exact += b @ a
    return first.numpy(), weight.double().numpy(), exact.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cycles", [2, 5, 12])
@pytest.mark.parametrize("shape", [(128, 128), (128, 384)])
def test_the_floor_of_a_displacement_covers_the_rounding_of_its_merges(dtype, cycles, shape):
    before, now, exact = _merged(dtype, cycles, 4, shape)
    name = str(dtype).removeprefix("torch.")
    found = spectrum(Difference(Dense(now, name), Dense(before, name), merges=cycles))
    noise = np.linalg.norm(now - before - exact, 2)
    assert noise <= found.noise_floor <= 2 * noise


def test_the_displacement_of_k_merges_has_rank_k_times_r():
    for dtype in ("float32", "bfloat16"):
        for cycles in (1, 3, 8):
            for seed in range(5):
                before, now, _ = _merged(getattr(torch, dtype), cycles, 4, (128, 96), seed)
                found = spectrum(Difference(Dense(now, dtype), Dense(before, dtype), cycles))
                assert numerical_rank(found.s, found.floor) == 4 * cycles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])  # of the adapter's entries, over the weight's
@pytest.mark.parametrize(("shape", "rank"), [((64, 128), 4), ((128, 128), 8), ((128, 384), 32)])
def test_the_floor_covers_the_rounding_of_the_adapter_s_product(dtype, size, shape, rank):
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(shape, generator=generator)).to(dtype)
    b = torch.randn((shape[0], rank), generator=generator).to(dtype)
    a = (0.01 * size * rank**-0.5 * torch.randn((rank, shape[1]), generator=generator)).to(dtype)
    now = weight + 2.0 * (b.float() @ a.float()).to(dtype)  # as PEFT has it
    name = str(dtype).removeprefix("torch.")
    factors = (b.double().numpy(), a.double().numpy())
    found = spectrum(
        Difference(
            Dense(now.double().numpy(), name),
            Dense(weight.double().numpy(), name),
            adapters=(Factored(*factors, 2.0, name), None),
        )
    )
    exact = 2.0 * factors[0] @ factors[1]
    noise = np.linalg.norm((now.double() - weight.double()).numpy() - exact, 2)
    assert noise <= found.noise_floor <= 2 * noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.1, 1.0, 50.0])  # of the adapters' entries, over the weight's
@pytest.mark.parametrize("merges", [0, 1, 2, 6])
@pytest.mark.parametrize("begins", ["merged", "within a cycle"])
@pytest.mark.parametrize("scale", [2.0, 1.5])
def test_the_floor_covers_the_rounding_of_every_product_in_between(
    dtype, size, merges, begins, scale
):
    """As PEFT computes them: each cycle is merged, and both weights may have an adapter."""
    name, (rows, cols), rank = str(dtype).removeprefix("torch."), (96, 128), 8
    generator = torch.Generator().manual_seed(merges)

    def cycle():
        b = torch.randn((rows, rank), generator=generator).to(dtype)
        a = 0.01 * size * rank**-0.5 * torch.randn((rank, cols), generator=generator)
        return b, a.to(dtype)

    def adapter(b, a):
        return Factored(b.double().numpy(), a.double().numpy(), scale, name)

    base = (0.02 * torch.randn((rows, cols), generator=generator)).to(dtype)
    cycles = [cycle() for _ in range(merges + 1)]
    earlier = None if begins == "merged" else (0.5 * cycles[0][0], cycles[0][1])
    before = base if earlier is None else base + scale * (earlier[0] @ earlier[1])
    for b, a in cycles[:-1]:
        base = base + scale * (b @ a)
    now = base + scale * (cycles[-1][0] @ cycles[-1][1])

    adapters = adapter(*cycles[-1]), None if earlier is None else adapter(*earlier)
    exact = sum(adapter(*each).product() for each in cycles)
    exact -= 0 if earlier is None else adapters[1].product()
    weights = [Dense(each.double().numpy(), name) for each in (now, before)]
    difference = Difference(*weights, merges, None, adapters)
    noise = np.linalg.norm(difference.values - exact, 2)
    found = spectrum(difference)
    assert noise <= found.noise_floor <= 3 * noise
    if noise < 0.1 * np.linalg.norm(exact, 2) / rank:
        directions = rank * (merges + 1)  # the earlier adapter has those of the first cycle
        assert numerical_rank(found.s, found.floor) == min(directions, rows)


@pytest.mark.parametrize("scale", [2.0**-500, 2.0**540])
def test_the_floor_of_numbers_whose_squares_overflow_is_that_of_the_others(scale):
    rng = np.random.default_rng(0)
    now, before, b, a = (rng.standard_normal(s) for s in ((24, 16), (24, 16), (24, 2), (2, 16)))

    def floor(by):
        adapter = Factored(by * b, a, 1.0, "float64")
        weights = Dense(by * now, "float64"), Dense(by * before, "float64")
        return spectrum(Difference(*weights, 1, None, (adapter, adapter))).noise_floor

    assert floor(scale) == pytest.approx(scale * floor(1.0), rel=1e-12)


def test_an_update_below_the_rounding_of_bfloat16_has_no_rank_above_the_floor():
    before, _, _ = _merged(torch.bfloat16, 0, 1, (96, 96))
    rng = np.random.default_rng(0)
    moved = before + 1e-5 * rng.standard_normal((96, 1)) @ rng.standard_normal((1, 96))
    now = torch.from_numpy(moved).to(torch.bfloat16).double().numpy()
    found = spectrum(Difference(Dense(now, "bfloat16"), Dense(before, "bfloat16")))
    assert effective_rank(found.s) > 4  # what the raw number makes of a rank-one step
    assert numerical_rank(found.s, found.floor) == 0


def _trained(dtype, steps, size, every=1, shape=(160, 96), seed=0):
    """A weight before and after `steps` changes of rank 8 within one subspace, added in `dtype`.

    Returns both in float64, and the exact sum of the changes. The entries of half of the rows
    change at each `every`-th step only.
    """
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((shape[1], 8)))[0].T
    first = torch.from_numpy(0.02 * rng.standard_normal(shape)).to(dtype)
    weight, exact = first.clone(), np.zeros(shape)
    for step in range(steps):
        change = size * (1 - step / steps) * rng.standard_normal((shape[0], 8)) @ directions
        change[::2] *= step % every == 0
        exact += change
        weight = (weight.double() + torch.from_numpy(change)).to(dtype)
    return first.double().numpy(), weight.double().numpy(), exact


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("steps", [1, 20, 240])
@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_the_floor_of_a_weight_that_is_trained_in_place_covers_each_step(dtype, steps, size):
    for seed in range(3):
        before, now, exact = _trained(getattr(torch, dtype), steps, size, seed=seed)
        found = spectrum(Difference(Dense(now, dtype), Dense(before, dtype), trained_steps=steps))
        noise = np.linalg.norm(now - before - exact, 2)
        assert noise <= found.noise_floor <= 2 * noise
        assert numerical_rank(found.s, found.floor) == 8
        storage = found.storage_noise_floor or found.noise_floor
        assert (numerical_rank(found.s, storage) > 8) == (steps > 1)


def test_steps_that_leave_a_weight_as_it_is_round_nothing():
    """The floor then counts more than there was: it is a bound still."""
    before, now, exact = _trained(torch.float32, 100, 1e-3, every=10)
    found = spectrum(Difference(Dense(now, "float32"), Dense(before, "float32"), trained_steps=100))
    assert np.linalg.norm(now - before - exact, 2) <= found.noise_floor
    assert numerical_rank(found.s, found.floor) == 8


def test_a_float32_weight_that_is_stored_as_bfloat16_has_two_roundings_that_count():
    before, now, _ = _trained(torch.float32, 100, 1e-2)
    before, now = (torch.from_numpy(w).to(torch.bfloat16).double().numpy() for w in (before, now))
    stored = Dense(now, "bfloat16"), Dense(before, "bfloat16")
    found = spectrum(Difference(*stored, trained_steps=100))
    assert found.storage_noise_floor == spectrum(Difference(*stored)).noise_floor
    assert 1 < found.noise_floor / found.storage_noise_floor < 1.001
    assert numerical_rank(found.s, found.floor) == 8


@pytest.mark.parametrize(("size", "of_all_steps"), [(1e-3, 8), (1e-4, 0)])
def test_no_floor_restores_the_rank_of_pure_bfloat16_training(size, of_all_steps):
    """Steps below half a unit in the last place are lost: no noise, but another training."""
    before, now, _ = _trained(torch.bfloat16, 100, size)
    found = spectrum(
        Difference(Dense(now, "bfloat16"), Dense(before, "bfloat16"), trained_steps=100)
    )
    assert numerical_rank(found.s, found.floor) > 2 * 8
    assert numerical_rank(found.s, found.noise_floor * np.sqrt(101 / 2)) == of_all_steps


def test_the_values_are_exact_differences():
    now, before = np.float32([[1.0, 2.0]]), np.float32([[1.0 - 2**-24, 4.0]])
    difference = Difference(Dense(now, "float32"), Dense(before, "float32"))
    np.testing.assert_array_equal(difference.values, [[2.0**-24, -2.0]])
    assert difference.shape == (1, 2)
