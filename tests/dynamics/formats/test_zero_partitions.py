"""ZeRO's partitions, written here as DeepSpeed lays them out: what needs no training to be tested.

Files that DeepSpeed itself wrote are read in test_deepspeed.py.
"""

from math import ceil

import pytest
import torch

import dynamics as dy
from tests.dynamics.formats.checking import assert_bits

SHAPES = {"a.weight": (3, 5), "b.weight": (7, 2), "b.bias": (7,), "c.weight": (1, 4)}
RANKS = 2


@pytest.fixture
def masters():
    """Name -> the float32 master of a parameter."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def save(folder, file, states):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(states, folder / file)


def save_joined(folder, masters, stage):
    """Stages 1 and 2: all parameters in one row of numbers, which is cut into a part per rank."""
    module = {name: master.bfloat16() for name, master in masters.items()}
    save(folder, "mp_rank_00_model_states.pt", {"module": module, "param_shapes": [SHAPES]})
    row = torch.cat([master.flatten() for master in masters.values()])
    row = torch.cat([row, torch.zeros(-len(row) % (2 * RANKS))])
    for rank, part in enumerate(row.chunk(RANKS)):
        states = {
            "zero_stage": stage,
            "partition_count": RANKS,
            "single_partition_of_fp32_groups": [part.clone()],
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save(folder, name, {"optimizer_state_dict": states})


def save_cut(folder, masters):
    """Stage 3: each parameter is cut into a part per rank, the last of which is padded."""
    parts = [[] for _ in range(RANKS)]
    for master in masters.values():
        length = ceil(master.numel() / RANKS)
        padded = torch.cat([master.flatten(), torch.zeros(RANKS * length - master.numel())])
        for rank in range(RANKS):
            parts[rank].append(padded[rank * length : (rank + 1) * length])
    for rank in range(RANKS):
        model = {"module": {name: torch.empty(0) for name in masters}, "param_shapes": [SHAPES]}
        save(folder, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
        states = {
            "zero_stage": 3,
            "partition_count": RANKS,
            "fp32_flat_groups": [torch.cat(parts[rank])],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save(folder, name, {"optimizer_state_dict": states})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_are_put_together_bit_by_bit(tmp_path, masters, stage):
    folder = tmp_path / "global_step7"
    if stage < 3:
        save_joined(folder, masters, stage)
    else:
        save_cut(folder, masters)
    run = dy.open_run(tmp_path)
    assert (run.format, run.steps.tolist()) == ("deepspeed", [7])
    assert_bits(run, 7, {name: each for name, each in masters.items() if each.ndim == 2})


def test_without_partitions_the_modules_weights_are_read(tmp_path, masters):
    save(tmp_path / "global_step3", "mp_rank_00_model_states.pt", {"module": masters})
    run = dy.open_run(tmp_path)
    assert_bits(run, 3, {name: each for name, each in masters.items() if each.ndim == 2})


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_is_missing_is_named(tmp_path, masters, stage):
    folder = tmp_path / "global_step7"
    if stage < 3:
        save_joined(folder, masters, stage)
    else:
        save_cut(folder, masters)
    next(folder.glob("*zero_pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(dy.DynamicsError, match=r"optimizer states of ranks \[0\], but 2 ranks"):
        dy.open_run(tmp_path)


def test_parameters_that_need_more_numbers_than_there_are_are_refused(tmp_path, masters):
    folder = tmp_path / "global_step7"
    save_cut(folder, {**masters, "c.weight": torch.zeros(1, 2)})
    with pytest.raises(dy.DynamicsError, match="numbers in its partitions"):
        dy.open_run(tmp_path)
