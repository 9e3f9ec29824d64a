"""Two processes of torchrun: probed gradients are means over the ranks, and rank 0 records."""

import pytest
import torch

import dynamics as dy
from tests.probes.adapted import adapted_model, frozen_matrices, relative_error, tokens
from tests.probes.frameworks.trainer import trained_by_trainer
from tests.probes.gradients import data_parallel_ranks
from tests.probes.torchrun import run_two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of two processes, which check that training computes the same bits."""
    folder = tmp_path_factory.mktemp("parallel")
    run_two_ranks(data_parallel_ranks, folder)
    return folder


@pytest.mark.parametrize("variant", data_parallel_ranks.VARIANTS)
def test_probed_gradients_are_those_of_the_twin_whose_base_is_in_ddps_buckets(two_ranks, variant):
    expected = torch.load(two_ranks / variant / "expected.pt")
    run = dy.open_run(two_ranks / variant / "run.zarr")
    assert run.steps.tolist() == list(range(data_parallel_ranks.STEPS + 1))
    assert len(expected) == data_parallel_ranks.STEPS * len(frozen_matrices(adapted_model()))
    for (step, name), gradient in expected.items():
        assert relative_error(run.read(name, step, "gradient").values, gradient) < 1e-6


def test_probed_gradients_are_those_of_one_process_with_all_the_batches(two_ranks):
    model = adapted_model()
    frozen = frozen_matrices(model)
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    for rank in (0, 1):
        ids = tokens(1, rank=rank)
        (model(input_ids=ids, labels=ids).loss / 2).backward()
    run = dy.open_run(two_ranks / "grouped.zarr")
    for name, parameter in frozen.items():
        assert relative_error(run.read(name, 1, "gradient").values, parameter.grad) < 1e-6


def test_a_rank_that_did_not_use_a_weight_counts_as_zero(two_ranks):
    model = data_parallel_ranks.Sometimes()
    model.sometimes.requires_grad_(True)
    model.sometimes(model.trained(torch.ones(2, 4))).sum().backward()
    run = dy.open_run(two_ranks / "sometimes.zarr")
    found = run.read("sometimes.weight", 1, "gradient").values
    assert relative_error(found, model.sometimes.weight.grad / 2) < 1e-6
    assert run.read("never.weight", 1, "gradient") is None


@pytest.mark.parametrize("name", data_parallel_ranks.WRAPPED)
def test_the_gradient_of_a_sum_of_parts_is_the_mean_over_the_ranks(two_ranks, name):
    """dL/dW of SLTrain's layers, which have no parameter W, over two micro-batches."""
    model = data_parallel_ranks.sparse_low_rank_model()
    run = dy.open_run(two_ranks / f"sltrain-{name}.zarr")
    assert run.steps.tolist() == list(range(data_parallel_ranks.STEPS + 1))
    weights = {
        name: torch.from_numpy(run.read(name, 0, "weight").values).double().requires_grad_()
        for name in ("0.weight", "2.weight")
    }
    for rank in (0, 1):
        for sign, loss in ((1, torch.square), (-1, torch.exp)):
            x = sign * data_parallel_ranks.inputs(0, rank).double()
            for path, layer in model.named_children():
                x = x @ weights[f"{path}.weight"].T if f"{path}.weight" in weights else layer(x)
            (loss(x).sum() / 2).backward()
    for path, weight in weights.items():
        found = run.read(path, 1, "gradient").values
        assert relative_error(found, weight.grad) < 1e-5


def test_the_trainer_in_two_processes_records_what_it_does_in_one(two_ranks, tmp_path):
    trained_by_trainer(tmp_path, "single", batch=4, every=1)
    run, single = dy.open_run(two_ranks / "trainer.zarr"), dy.open_run(tmp_path / "single.zarr")
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    for name in frozen_matrices(adapted_model()):
        one, other = (each.read(name, 1, "gradient").values for each in (run, single))
        assert relative_error(one, other) < 1e-6
