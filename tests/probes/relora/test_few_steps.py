"""Every part of the ReLoRA experiment once, on runs of four steps, for `make test-fast`.

The other tests of this directory look at runs that are long enough for more to happen.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import dynamics as dy
from probes.relora.__main__ import app
from probes.relora.demo import run_demo
from probes.relora.evaluation.blimp_data import read_blimp
from probes.relora.evaluation.evaluate import evaluate, validation_loss
from probes.relora.evaluation.evaluations import BlimpEvaluation, PerplexityEvaluation
from probes.relora.experiment import run_experiment
from probes.relora.restart_ablation import Restart, restart_losses
from probes.relora.sweep import over_seeds, run_sweep
from probes.relora.sweep_plan import plan
from tests.probes.relora.evaluation.scored_texts import SEQUENCE_LENGTH, TEXTS, write_pairs
from tests.short_run import TEXT, short_config

STEPS, MERGE = 4, 2
FEW_STEPS: dict[str, Any] = {
    "max_steps": STEPS,
    "reset_every": MERGE,
    "log_every": 1,
    "evaluate_every": 2,
    "record_every": 2,
    "save_every": 2,
    "batch_size": 2,
    "sequence_length": SEQUENCE_LENGTH,
    "validation_sequences": 4,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text(TEXT[:60_000])
    return folder


@pytest.fixture(scope="module")
def blimp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("blimp"))


@pytest.fixture(scope="module")
def swept(text: Path, blimp: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(two runs that differ in their seed, their folder); evaluated while they were trained."""
    wanted = vars(short_config(lora_dropout=0.0, **FEW_STEPS))
    default = vars(plan("micro", methods=["relora"])[0].config)
    words = [f"{name}={value}" for name, value in wanted.items() if value != default[name]]
    runs = plan("micro", methods=["relora"], words=words, seeds=[0, 1])
    folder = tmp_path_factory.mktemp("sweep")
    evaluations = [BlimpEvaluation(read_blimp(blimp)), PerplexityEvaluation(TEXTS)]
    for run in runs:
        output, quiet = folder / run.name, {"text": text, "say": lambda line: None}
        run_experiment(run.config, output, evaluations=evaluations, **quiet)
    return runs, folder


@pytest.fixture(scope="module")
def run(swept: Any) -> Path:
    runs, folder = swept
    return folder / runs[0].name


def test_recording_and_checkpoints_hold_the_same_merged_run(run: Path) -> None:
    recording, checkpoints = dy.open_run(run / "run.zarr"), dy.open_run(run)
    assert recording.steps.tolist() == [0, 2, 4]
    assert checkpoints.steps.tolist() == [2, 4]
    merges = [event.step for event in recording.events if event.kind == "merge"]
    assert merges == [MERGE]
    for name in checkpoints.matrices:
        for step in (2, 4):
            one, other = (each.read(name, step, "weight") for each in (recording, checkpoints))
            np.testing.assert_allclose(one.values, other.values, rtol=1e-5, atol=1e-7)
    assert dy.audit(run / "run.zarr").severity != "fail"


def test_evaluations_while_training_are_those_of_the_checkpoints(
    run: Path, text: Path, blimp: Path, tmp_path: Path
) -> None:
    scalars = dy.open_run(run / "run.zarr").scalars
    copied = shutil.copytree(run, tmp_path / "run")
    evaluations = [
        BlimpEvaluation(read_blimp(blimp)),
        PerplexityEvaluation(TEXTS),
        validation_loss(run, text),
    ]
    found = evaluate(copied, evaluations, say=lambda line: None)
    assert [each.step for each in found] == [2, 4] * 3
    for each in found:
        for name, value in each.scalars.items():
            series = scalars["eval_loss" if name == "validation_loss" else name]
            assert series[[0, 2, 4].index(each.step)] == pytest.approx(value, rel=1e-5), name


def test_the_command_evaluates_and_shows_a_table(run: Path, blimp: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    done = CliRunner().invoke(app, ["evaluate", str(copied), "--blimp", str(blimp), "--limit", "1"])
    assert done.exit_code == 0, done.output
    assert "BLiMP" in done.output


def test_a_restart_taken_apart_begins_where_the_run_was(run: Path, text: Path) -> None:
    restarts = [Restart(True, True, True), Restart(False, False, False)]
    losses = restart_losses(run, MERGE, text=text, restarts=restarts, steps=2)
    logged = dy.open_run(run / "run.zarr").scalars["eval_loss"]
    whole = losses.isel(restart=0)
    assert whole.sel(after=-1).item() == pytest.approx(logged[1], rel=1e-6)
    assert whole.sel(after=2).item() == pytest.approx(logged[2], rel=1e-6)
    assert losses.sel(after=-1).isel(restart=1).item() == whole.sel(after=-1).item()


def test_a_sweep_of_finished_runs_compares_them(swept: Any, text: Path) -> None:
    runs, folder = swept
    said: list[str] = []
    comparison = run_sweep(
        runs, "micro", folder, text=text, say=said.append, kinds=["displacement"]
    )
    assert said[:2] == [f"{run.name}: finished before" for run in runs]
    assert comparison["seed"].values.tolist() == [0, 1]
    losses = over_seeds(comparison, "loss").sel(step=STEPS)
    assert losses["mean"].item() == pytest.approx(float(comparison["loss"].sel(step=STEPS).mean()))


def test_the_demo_goes_from_text_to_figures(text: Path, tmp_path: Path) -> None:
    comparison = run_demo(tmp_path / "demo", short_config(**FEW_STEPS), text=text)
    assert comparison["run"].values.tolist() == ["full_rank", "relora"]
    assert (comparison["status"].sel(kind="weight") == dy.Status.MEASURED).all()
    events = json.loads(comparison.attrs["events"])
    assert [each["step"] for each in events["relora"] if each["kind"] == "merge"] == [MERGE]
    for name in ("recordings.zarr", "checkpoints.zarr"):
        assert dy.load(tmp_path / "demo" / name)["step"][-1] == STEPS
    figures = list((tmp_path / "demo/figures").glob("*.png"))
    assert figures
    assert all(path.stat().st_size > 10_000 for path in figures)
