"""What is recorded means the same in every training stack.

Each recorded gradient is compared with the definition, computed in float64 from the weights that
the same recording holds for the step before, and with what the optimizer did to the weights.
"""

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.recordings import Recording
from tests.probes.adapted import relative_error
from tests.probes.frameworks import stacks_ranks
from tests.probes.stacks import CASES, LR, ONE_PROCESS, STEPS, TWO_PROCESSES, Case, reference
from tests.probes.torchrun import run_two_ranks

# Of the Frobenius norm. Forward and backward round inputs, weights and products to the dtype of
# autocast, a handful of roundings one after another: 8 times its eps (bfloat16: 2^-8, 1/32 in all).
# float32 sums few numbers; the order of the summands differs between stacks.
TOLERANCE = {"float32": 2e-6, "bfloat16": 8 * 2**-8, "float16": 8 * 2**-11}
NAMES = {"up_proj.weight", "down_proj.weight"}
STACKS = [
    pytest.param(name, marks=() if name == "plain" else pytest.mark.slow) for name in ONE_PROCESS
]


def check(store, case, *, clipped=None):
    """Every record of a recording against the definition; returns the largest relative error."""
    run = dy.open_run(store)
    assert run.steps.tolist() == list(range(STEPS + 1))
    assert {name.removeprefix("net.") for name in run.matrices} == NAMES
    worst = 0.0
    for step in range(1, STEPS + 1):
        before, after, found = (
            {name.removeprefix("net."): run.read(name, at, kind).values for name in run.matrices}
            for at, kind in ((step - 1, "weight"), (step, "weight"), (step, "gradient"))
        )
        expected = reference(case, before, step, clipped=clipped)
        for name in NAMES:
            error = relative_error(found[name], expected[name])
            assert error < TOLERANCE[case.precision], (step, name, error)
            worst = max(worst, error)
            if clipped is None:  # the gradient that was consumed, and no other, was consumed
                stepped = torch.as_tensor(before[name]).add(torch.as_tensor(found[name]), alpha=-LR)
                np.testing.assert_array_equal(after[name], stepped.numpy())
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stack", STACKS)
def test_the_recorded_gradient_is_the_definition_in_every_stack(tmp_path, stack, case):
    ONE_PROCESS[stack](case, tmp_path / "run.zarr", tmp_path)
    check(tmp_path / "run.zarr", case)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_before_clipping_it_is_the_unclipped_one_in_every_stack(tmp_path, stack):
    for precision in TOLERANCE:
        case = Case(precision, 2, clip=True, record=("weight", "gradient_before_clipping"))
        ONE_PROCESS[stack](case, tmp_path / f"{precision}.zarr", tmp_path)
        check(tmp_path / f"{precision}.zarr", case, clipped=False)
    assert "before clipping" in Recording(tmp_path / "float32.zarr").attrs["gradient"]


@pytest.mark.slow
@pytest.mark.parametrize("record", [("weight", "gradient"), ("gradient_before_clipping",)])
@pytest.mark.parametrize("stack", STACKS)
def test_training_computes_the_same_bits_in_every_stack(tmp_path, stack, record):
    for precision in ("bfloat16", "float16"):
        case = Case(precision, 2, clip=True, dropout=0.3, record=record)
        ends = []
        for store in (tmp_path / f"{precision}.zarr", None):
            torch.manual_seed(7)
            model = ONE_PROCESS[stack](case, store, tmp_path)
            ends.append(([p.detach() for p in model.parameters()], torch.get_rng_state()))
        assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
        assert torch.equal(ends[0][1], ends[1][1])
        assert dy.open_run(tmp_path / f"{precision}.zarr").steps.tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of two processes, which check that training computes the same bits."""
    folder = tmp_path_factory.mktemp("stacks")
    run_two_ranks(stacks_ranks, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stack", TWO_PROCESSES)
def test_two_processes_record_what_one_with_all_the_data_does(two_ranks, stack, case):
    check(two_ranks / f"{stack}-{case}.zarr", case)


@pytest.mark.slow
@pytest.mark.parametrize("stack", TWO_PROCESSES)
def test_before_clipping_it_is_averaged_over_the_ranks(two_ranks, stack):
    check(two_ranks / f"{stack}-unclipped.zarr", stacks_ranks.UNCLIPPED, clipped=False)


@pytest.mark.slow
def test_under_ddp_rank_0_alone_may_record(two_ranks):
    check(two_ranks / "alone_in_ddp.zarr", Case())


@pytest.mark.slow
def test_lightning_in_two_processes_records_what_one_does(two_ranks):
    check(two_ranks / "lightning.zarr", Case(accumulate=2, clip=True))


@pytest.mark.slow
def test_adapters_of_a_sharded_model_are_those_of_the_whole_one(two_ranks):
    sharded, whole = (
        Recording(two_ranks / f"adapted-{name}.zarr") for name in ("sharded", "whole")
    )
    assert sharded.paths == whole.paths
    matrices = [path for path in whole.paths if path.startswith(("weight/", "adapter/"))]
    assert len(matrices) == 16 + 2 * 6
    for path in matrices:
        for index in (0, 1):
            assert relative_error(sharded.read(path, index), whole.read(path, index)) < 1e-6


@pytest.mark.slow
def test_spectra_of_a_sharded_model_are_those_of_the_whole_one(two_ranks):
    sharded, whole = (
        dy.analyze(two_ranks / f"adapted-{name}-spectra.zarr") for name in ("sharded", "whole")
    )
    assert whole.kind.values.tolist() == ["weight", "adapter", "update", "displacement"]
    for name in ("singular_value", "noise_floor", "rank_bound"):
        np.testing.assert_allclose(sharded[name], whole[name], rtol=1e-5, atol=1e-7, err_msg=name)
