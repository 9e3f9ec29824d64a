"""Weights that are split twice, by tensor parallelism and by FSDP2, are recorded whole."""

import pytest
import torch

import dynamics as dy
from tests.probes.model import mesh_ranks
from tests.probes.torchrun import run_ranks


@pytest.mark.slow
def test_a_model_on_a_mesh_is_recorded_whole_and_trains_the_same_bits(tmp_path):
    run_ranks(mesh_ranks, tmp_path, ranks=4)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(4)]
    assert all(same for same, _, _ in results)
    _, weights, gradients = results[0]
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == list(range(mesh_ranks.STEPS + 1))
    for name in weights:
        for kind, expected in (("weight", weights), ("gradient", gradients)):
            recorded = run.read(name, mesh_ranks.STEPS, kind).values
            assert torch.equal(torch.from_numpy(recorded), expected[name])
