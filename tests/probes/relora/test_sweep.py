"""Sweeps: which runs, matched how, trained once, compared with their settings as coordinates."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from probes.relora import as_published, micro, parameter_counts, tiny
from probes.relora.config import METHODS
from probes.relora.experiment import run_experiment
from probes.relora.sweep import compare_runs, over_seeds, run_sweep
from probes.relora.sweep_plan import (
    DifferentSchedulesWarning,
    matched,
    plan,
    tokens_per_step,
    warn_of_schedules,
)
from tests.short_run import TEXT, short_config

WORDS = [
    f"{name}={value}"
    for name, value in vars(short_config(max_steps=12)).items()
    if name in ("hidden_size", "intermediate_size", "num_layers", "vocab_size", "sequence_length")
    or name in ("max_steps", "batch_size", "warmup_steps", "restart_warmup_steps", "reset_every")
    or name in ("lora_rank", "lora_alpha", "log_every", "evaluate_every", "record_every")
    or name == "save_every"
]


def test_a_plan_has_every_combination_and_no_run_twice() -> None:
    runs = plan(
        "micro",
        methods=["full_rank", "relora", "lora"],
        words=["lora_rank=4,8", "reset_every=40,80", "scaling=2", "warmup_steps=20"],
        seeds=[0, 1],
    )
    assert [run.name for run in runs if run.config.seed == 0] == [
        "full_rank-seed=0",
        "relora-lora_rank=4-reset_every=40-seed=0",
        "relora-lora_rank=4-reset_every=80-seed=0",
        "relora-lora_rank=8-reset_every=40-seed=0",
        "relora-lora_rank=8-reset_every=80-seed=0",
        "lora-lora_rank=4-seed=0",
        "lora-lora_rank=8-seed=0",
    ]
    assert {run.config.scaling for run in runs if run.config.adapted} == {2.0}
    assert len(runs) == 14


def test_all_methods_are_planned_by_one_word() -> None:
    runs = plan("micro", methods=["all"], seeds=[0, 1, 2])
    assert [run.varied["method"] for run in runs[::3]] == list(METHODS)
    assert len(runs) == 3 * len(METHODS)
    with pytest.raises(DynamicsError, match="method"):
        plan("micro", methods=["all", "relora"])


def test_a_method_as_published_stands_beside_others() -> None:
    runs = plan("micro", methods=["full_rank", "relora", "relora:as_published"], seeds=[0, 1])
    assert [run.name for run in runs if run.config.seed == 1] == [
        "full_rank-seed=1",
        "relora-seed=1",
        "relora-as_published-seed=1",
    ]
    assert [run.varied["method"] for run in runs[::2]] == [
        "full_rank",
        "relora",
        "relora:as_published",
    ]
    assert [run.config.merge_with_scaling for run in runs[2:]] == [True, True, False, False]
    assert runs[4].config == as_published(micro())
    with pytest.raises(DynamicsError, match="No variant 'fixed' of relora; write relora, or"):
        plan("micro", methods=["relora:fixed"])


def test_runs_are_matched_by_tokens_or_by_trainable_parameters() -> None:
    reference = tiny("full_rank")
    longer = replace(tiny(), sequence_length=4096, batch_size=8)
    by_tokens = matched(longer, reference, "tokens")
    assert by_tokens.max_steps * tokens_per_step(by_tokens) == 20_000 * 2_097_152
    by_parameters = matched(tiny(), reference, "trainable_parameters")
    trainable = parameter_counts(by_parameters)[0]
    one_more = replace(by_parameters, lora_rank=by_parameters.lora_rank + 1)
    step = parameter_counts(one_more)[0] - trainable
    assert abs(trainable - parameter_counts(reference)[0]) <= step / 2
    assert by_parameters.scaling == 2.0
    assert matched(tiny(), reference, "steps") == tiny()
    with pytest.raises(DynamicsError, match="put full_rank first"):
        matched(reference, tiny(), "trainable_parameters")
    with pytest.raises(DynamicsError, match="at every rank"):
        matched(replace(tiny(), target_modules=("v_proj",)), tiny(), "trainable_parameters")
    with pytest.raises(DynamicsError, match="match is 'loss'; it must be one of steps, tokens, tr"):
        matched(tiny(), tiny(), "loss")


def test_runs_whose_learning_rates_differ_are_told() -> None:
    runs = plan(
        "micro", methods=["relora"], words=["restart_warmup_steps=4,8", "learning_rate=1e-3"]
    )
    with pytest.warns(
        DifferentSchedulesWarning, match=r"first at step 81 \(0\.00025 and 0\.000125"
    ):
        warn_of_schedules(runs)


@pytest.mark.filterwarnings("error::probes.relora.sweep_plan.DifferentSchedulesWarning")
def test_runs_of_one_schedule_are_not() -> None:
    warn_of_schedules(plan("micro", methods=["relora"], words=["lora_rank=4,8"], seeds=[0, 1]))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep of which one run was finished and another one interrupted after 6 steps."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "text").mkdir()
    (folder / "text/numbers.txt").write_text(TEXT[:60_000])
    runs = plan("micro", methods=["relora"], words=WORDS, seeds=[0, 1])
    for run in runs:
        quiet = {"text": folder / "text", "say": lambda line: None}
        run_experiment(run.config, folder / "out" / run.name, **quiet)
    interrupted = folder / "out" / runs[1].name
    expected = load_file(interrupted / "checkpoint-12/adapter_model.safetensors")
    shutil.rmtree(interrupted / "checkpoint-12")
    said: list[str] = []
    comparison = run_sweep(
        runs, "micro", folder / "out", text=folder / "text", say=said.append, kinds=["displacement"]
    )
    return runs, folder / "out", said, expected, comparison


@pytest.mark.slow
def test_a_sweep_skips_what_is_finished_and_resumes_what_is_not(swept: Any) -> None:
    runs, output, said, expected, _ = swept
    assert said[:3] == [
        f"{runs[0].name}: finished before",
        f"{runs[1].name}: training",
        f"{runs[1].name}: finished",
    ]
    assert "Resuming after step 6" in (output / f"{runs[1].name}.log").read_text()
    resumed = load_file(output / runs[1].name / "checkpoint-12/adapter_model.safetensors")
    for name, each in expected.items():
        torch.testing.assert_close(resumed[name], each)


@pytest.mark.slow
def test_a_sweep_ends_with_its_runs_compared(swept: Any) -> None:
    runs, output, _, _, comparison = swept
    stored = dy.load(output / "comparison.zarr")
    assert stored["run"].values.tolist() == [run.name for run in runs]
    assert stored["seed"].values.tolist() == [0, 1]
    assert stored["trainable_parameters"].values.tolist() == [
        parameter_counts(run.config)[0] for run in runs
    ]
    assert set(json.loads(stored.attrs["events"])) == {run.name for run in runs}
    again = compare_runs(runs, output, kinds=["displacement"])
    for name in ("numerical_rank", "effective_rank"):
        np.testing.assert_array_equal(again[name], comparison[name])


@pytest.mark.slow
def test_kinds_that_no_run_has_are_refused(swept: Any) -> None:
    runs, output, _, _, _ = swept
    either = compare_runs(runs, output, kinds=["gradient", "adapter"], steps=[12])
    assert either["kind"].values.tolist() == ["adapter", "gradient"]
    for kinds in (["optimizer_update"], ["weight", "optimizer_update"]):
        with pytest.raises(MissingError, match=r"ha[sv]e? no |No run has optimizer_update"):
            compare_runs(runs, output, kinds=kinds, steps=[12])


@pytest.mark.slow
def test_statistics_over_seeds_take_a_run_as_one_measurement(swept: Any) -> None:
    _, _, _, _, comparison = swept
    ranks = comparison["effective_rank"].sel(kind="displacement", step=12)
    inside = ranks.values[:, comparison["layer"].values >= 0].mean(axis=1)  # by run
    found = over_seeds(comparison.sel(kind="displacement", step=12), "effective_rank")
    assert found["run"].values.tolist() == ["relora"]
    assert found["mean"].item() == pytest.approx(inside.mean())
    # Of two values, t with one degree of freedom: tan(π·0.475) half differences.
    half = np.tan(np.pi * 0.475) * abs(inside[0] - inside[1]) / 2
    assert (found["upper"] - found["mean"]).item() == pytest.approx(half)
    layers = over_seeds(
        comparison.sel(kind="displacement", step=12), "effective_rank", by_layer=True
    )
    assert layers["layer"].values.tolist() == [0, 1]
    losses = over_seeds(comparison, "loss").sel(step=12)
    assert losses["mean"].item() == pytest.approx(float(comparison["loss"].sel(step=12).mean()))


@pytest.mark.slow
def test_a_folder_of_another_sweep_is_refused(swept: Any) -> None:
    runs, output, _, _, _ = swept
    other = [replace(run, config=replace(run.config, learning_rate=0.5)) for run in runs]
    rate = micro().learning_rate
    with pytest.raises(DynamicsError, match=f"was started with learning_rate = {rate}, not 0.5"):
        run_sweep(other, "micro", output, say=lambda line: None)
    with pytest.raises(DynamicsError, match="A sweep takes two runs or more"):
        run_sweep(runs[:1], "micro", output)


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_are_kept(swept: Any, tmp_path: Path) -> None:
    _, output, _, _, _ = swept
    (tmp_path / "short.txt").write_text("too short")
    runs = plan("micro", methods=["relora"], words=WORDS, seeds=[0, 1, 2])
    with pytest.raises(DynamicsError, match=r"1 of 3 runs failed, the first one: relora-seed=2"):
        run_sweep(runs, "micro", output, text=tmp_path, workers=3, say=lambda line: None)
    assert "give more text" in (output / "relora-seed=2.log").read_text()
