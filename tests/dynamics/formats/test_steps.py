"""Which number in a name is the step of a checkpoint."""

import pytest

from dynamics.formats.shared.steps import named_step, step_in_name, step_inside

STEPS = {
    "step1000": 1000, "step_000100": 100, "step-00000100": 100, "step=300": 300, "step.7": 7,
    "Step12": 12, "globalStep12": 12, "global_step_100": 100, "global_step100": 100,
    "iter_0000100": 100, "iteration-5": 5, "update_200": 200, "ckpt-100": 100, "ckpt7": 7,
    "checkpoint-7": 7, "model_2000": 2000, "model-000200": 200, "model010000": 10000, "100": 100,
    "0001": 1, "step10k": 10_000, "step-1.5M": 1_500_000, "1.5M": 1_500_000, "10ksteps": 10_000,
    "20k_steps": 20_000, "10000_steps": 10_000, "step_5e3": 5000, "epoch=1-step=100": 100,
    "epoch=3-step=1500-val_loss=2.71": 1500, "epoch_3_iter_40": 40, "epoch-3-1500": 1500,
    "step1000-unsharded": 1000, "stage1-step1000-tokens3B": 1000, "step_40_of_90": 40,
    "ckpt_1000_v2": 1000, "iter7.seed3": 7, "rank0_step5": 5, "best-step_300": 300,
    "2026-01-01_step_5": 5, "step_5-20260101": 5, "a1b2c3d4-step9": 9, "step_100_rank_1": 100,
    "epoch_1": 1, "checkpoint_epoch_3": 3, "3epochs": 3, "model_epoch_10": 10, "x_1": 1,
    "ep0-ba500-rank0": 500,
}  # fmt: skip
NONE = [
    "best",
    "last",
    "final",
    "latest",
    "checkpoint-last",
    "v2",
    "model_v2",
    "version_3",
    "llama-7b",
    "llama-7b-final",
    "pythia-125m",
    "Llama-3.1-8B",
    "gpt2",
    "phi-3",
    "rank0",
    "seed3",
    "eval_100",
    "val_loss=2.71",
    "tokens3B",
    "2026-01-01",
    "20260101",
    "2026-01-01_12-00-00",
    "20260101-120000",
    "run-20260101000000000000",
    "a1b2c3d4e5f6",
    "123e4567-e89b-12d3-a456-426614174000",
    "checkpoint-99999999999999999999",
    "step_1000000000000000",
    "model-00001-of-00002",
    "ckpt_1.0",
    "lightning_logs",
    "step_",
    "run_5",
]


@pytest.mark.parametrize("name", STEPS)
def test_the_step_is_told_by_the_surest_word(name):
    assert step_in_name(name) == STEPS[name]


@pytest.mark.parametrize("name", NONE)
def test_what_counts_nothing_is_no_step(name):
    assert step_in_name(name) is None


def test_a_step_is_surer_than_an_epoch_and_an_epoch_than_any_other_word():
    names = ("step_5", "checkpoint-5", "5", "epoch_5", "x_5", "x5")
    assert [named_step(each).level for each in names] == [0, 0, 0, 1, 2, 3]
    assert named_step("ema_step_5").others == ("ema",)
    assert named_step("model_step_5").others == ()


def test_a_number_in_a_file_is_a_step_only_if_it_can_be_one():
    values = [5, 0, -1, True, 5.0, "5", None, 2**63, 10**15]
    assert [step_inside(each) for each in values] == [5, 0, *[None] * 7]
