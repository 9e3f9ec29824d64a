"""A restart taken apart: what the merge, the optimizer reset and the ramp each do to the loss."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from probes.relora.experiment import run_experiment
from probes.relora.restart_ablation import restart_losses
from tests.short_run import TEXT, short_config

pytestmark = pytest.mark.slow

STEP, FURTHER = 12, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """s = 2; without dropout, so that its own steps can be repeated."""
    folder = tmp_path_factory.mktemp("restarts")
    (folder / "text").mkdir()
    (folder / "text/numbers.txt").write_text(TEXT)
    config = short_config(
        lora_dropout=0.0, learning_rate=1e-2, validation_sequences=32, restart_warmup_steps=2
    )
    run_experiment(config, folder / "run", text=folder / "text", say=lambda line: None)
    return folder / "run"


@pytest.fixture(scope="module")
def losses(run: Path) -> xr.DataArray:
    return restart_losses(run, STEP, text=run.parent / "text", steps=FURTHER)


def test_the_whole_restart_is_what_the_run_did(run: Path, losses: xr.DataArray) -> None:
    logged = dy.open_run(run).scalars["eval_loss"]  # at 6, 12, 18, 24
    whole = losses.sel(restart="merge + reset + ramp")
    assert whole.sel(after=-1).item() == pytest.approx(logged[1], rel=1e-6)
    assert whole.sel(after=FURTHER).item() == pytest.approx(logged[2], rel=1e-6)


def test_a_merge_changes_the_loss_by_rounding_and_one_without_its_scale_by_more(
    losses: xr.DataArray,
) -> None:
    assert losses.sizes == {"restart": 9, "after": FURTHER + 2}
    before, after = losses.sel(after=-1), losses.sel(after=0)
    assert np.ptp(before.values) == 0
    scaled = ~losses["restart"].str.contains("unscaled")
    assert float(abs(after - before)[scaled].max()) < 2e-6
    # Half of the cycle's update is gone; whether that is for the better is up to the model.
    assert abs(after - before).sel(restart="unscaled merge + reset + ramp").item() > 2e-5


def test_a_step_of_the_ramp_without_a_rate_changes_nothing(losses: xr.DataArray) -> None:
    for name in losses["restart"].values.tolist():
        moved = abs(losses.sel(restart=name, after=1) - losses.sel(restart=name, after=0)).item()
        assert (moved < 2e-6) == ("ramp" in name), name


def test_what_does_not_merge_there_is_refused(run: Path) -> None:
    text = run.parent / "text"
    with pytest.raises(DynamicsError, match=r"merges at multiples of 6, and not at step 9\."):
        restart_losses(run, 9, text=text)
    (run / "checkpoint-6/trainer_state.json").unlink()
    with pytest.raises(MissingError, match=r"No complete checkpoint of step 6 in .*\[12, 18, 24\]"):
        restart_losses(run, 6, text=text)
