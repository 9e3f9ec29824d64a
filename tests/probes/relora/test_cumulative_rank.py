"""What restarts do to the rank of the displacement, from one rank-r adapter to full rank."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import train
from tests.probes.relora.conftest import random_data, tiny_config

pytestmark = pytest.mark.slow

RANK, CYCLE, STEPS = 2, 4, 16


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Never reset at r = 32, the largest min(m, n), with alpha = r; r = 2 reset at 4, 8, 12."""
    variants: dict[str, dict[str, Any]] = {
        "full_rank": {"method": "full_rank"},
        "lora, r = min(m, n)": {"method": "lora", "lora_rank": 32, "lora_alpha": 32.0},
        "relora, r = 2": {"method": "relora", "lora_rank": RANK, "lora_alpha": 2.0 * RANK},
        "lora, r = 2": {"method": "lora", "lora_rank": RANK, "lora_alpha": 2.0 * RANK},
    }
    folder = tmp_path_factory.mktemp("ranks")
    for label, changes in variants.items():
        config = tiny_config(
            max_steps=STEPS,
            reset_every=CYCLE,
            evaluate_every=STEPS,
            save_every=STEPS,
            **changes,
        )
        recorder = RecorderCallback(folder / label / "run.zarr", every=2)
        train(config, random_data(), folder / label, callbacks=[recorder], on_event=recorder.event)
    paths = {label: folder / label / "run.zarr" for label in variants}
    return dy.compare(paths, kinds=["displacement"], select="*_proj")


def ranks(comparison: xr.Dataset, run: str, step: int) -> xr.DataArray:
    inside = comparison.where(comparison["layer"] >= 0, drop=True)
    return inside["numerical_rank"].sel(kind="displacement", run=run, step=step)


def test_without_resets_at_the_full_rank_the_displacement_is_of_full_rank(
    comparison: xr.Dataset,
) -> None:
    for run in ("full_rank", "lora, r = min(m, n)"):
        found = ranks(comparison, run, STEPS)
        assert (found == np.minimum(found["rows"], found["cols"])).all(), run


@pytest.mark.parametrize("step", [2, 4, 6, 8, 12, 14, 16])
def test_reset_k_times_the_displacement_has_at_most_one_r_for_each_cycle(
    comparison: xr.Dataset, step: int
) -> None:
    cycles = -(-step // CYCLE)
    found = ranks(comparison, "relora, r = 2", step)
    assert (found <= cycles * RANK).all()
    # All of it is used but what a cycle of a step with learning rate 0 could not reach yet.
    assert float(found.mean()) > (cycles - 1) * RANK
    assert (ranks(comparison, "lora, r = 2", step) <= RANK).all()


def test_the_comparison_plot_shows_it(comparison: xr.Dataset) -> None:
    axes = dy.plot_comparison(comparison, "numerical_rank", kind="displacement")
    drawn = {
        line.get_label(): line.get_ydata()[np.isfinite(line.get_ydata())][-1]
        for line in axes.get_lines()
        if len(line.get_xdata()) > 2
    }
    assert drawn["lora, r = 2"] == RANK
    assert drawn["relora, r = 2"] == RANK * STEPS / CYCLE
    assert drawn["lora, r = min(m, n)"] == drawn["full_rank"] > 2 * drawn["relora, r = 2"]
