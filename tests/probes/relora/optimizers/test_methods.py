"""Runs of the methods that have an optimizer of their own: recorded, resumed, audited, bounded."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import dynamics as dy
from dynamics.errors import DynamicsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import PRESETS, TrainConfig, as_published, micro, train
from probes.relora.config import METHODS
from probes.relora.training.run_directory import CONFIG_NAME, read_identity
from tests.probes.relora.conftest import assert_equal_weights, random_data, tiny_config
from tests.probes.relora.training.test_resuming import interrupted_at

NEW = ("galore", "fira", "apollo", "muon", "cola", "sltrain")


def config_of(method, **changes) -> TrainConfig:
    # r = 4 and a projector every 4 of 16 steps, as ReLoRA merges.
    return tiny_config(method=method, weight_decay=0.0, other_learning_rate=1e-3, **changes)


@pytest.fixture(scope="module", params=NEW)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(request.param, lora_rank=2)
    recorder = RecorderCallback(folder / "run.zarr", every=2)
    trainer = train(config, random_data(), folder, callbacks=[recorder], on_event=recorder.event)
    return config, folder, trainer.model


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path):
    config, folder, model = run
    for step in (4, 6):
        cut = interrupted_at(step, type("Run", (), {"path": folder}), tmp_path / str(step))
        resumed = train(config, random_data(), cut, resume=True)
        assert_equal_weights(resumed.model, model)


@pytest.mark.slow
def test_recordings_have_the_projectors_the_ranks_and_no_defect(run):
    config, folder, _ = run
    recording = dy.open_run(folder / "run.zarr")
    events = [each for each in recording.events if each.kind == "projection"]
    report = dy.audit(recording)
    assert not report.failed, report.line
    update = dy.analyze(recording, kinds=["update", "displacement"], select="*.layers.*").isel(
        step=slice(1, None)
    )
    full = np.minimum(update["rows"], update["cols"])
    if config.method in ("muon", "cola", "sltrain"):
        assert not events
    else:
        assert [each.step for each in events] == [0, 4, 8, 12]
        assert len(events[0].attrs["matrices"]) == 14
        assert events[0].attrs["rank"] == 2
        assert 0 < events[1].attrs["energy_inside"] < 1
        assert 0 < events[1].attrs["overlap_with_last"] < 1
    if config.method != "galore":
        assert (update["rank_bound"] == full).all()
        if config.method in ("fira", "apollo", "muon"):
            last = update["numerical_rank"].sel(kind="displacement").isel(step=-1)
            assert (last == full).all()
        return
    bound = update["rank_bound"]
    assert (bound.sel(kind="update") == 2).all()
    expected = [2, 2, 4, 4, 6, 6, 8, 8]
    assert bound.sel(kind="displacement").isel(matrix=0).values.tolist() == expected
    assert (update["numerical_rank"] == bound).all()
    # Four steps as the gap is, but from the middle of one: two projectors.
    middle = dy.analyze(recording, kinds=["update"], select="*.layers.*", lag=4).isel(kind=0)
    assert middle["rank_bound"].isel(matrix=0).sel(step=[4, 6, 8]).values.tolist() == [2, 4, 2]
    halves = middle.sel(step=[4, 6, 8])
    assert (halves["numerical_rank"] == halves["rank_bound"]).all()
    inside = dy.gradient_subspaces(recording, k=2, select="*.layers.*").isel(step=slice(1, None))
    assert np.isfinite(inside["energy_in_projector"]).all()
    assert (inside["energy_in_projector"] < inside["energy"]).all()


class Mover(TrainerCallback):
    """Moves one weight out of its directions, within a gap."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                weight = model.model.layers[1].mlp.up_proj.weight
                weight += 1e-3 * torch.eye(*weight.shape)


@pytest.mark.slow
def test_a_weight_that_leaves_its_projector_is_named_by_the_audit(tmp_path):
    recorder = RecorderCallback(tmp_path / "run.zarr", every=2)
    config = config_of("galore", lora_rank=2, max_steps=4)
    train(
        config,
        random_data(),
        tmp_path,
        callbacks=[Mover(), recorder],
        on_event=recorder.event,
    )
    report = dy.audit(tmp_path / "run.zarr")
    assert len(report.of("rank_bound")) == 14
    (failed,) = [each for each in report.verdicts if each.severity == "fail"]
    assert (failed.check, failed.step) == ("rank_bound", 4)
    assert failed.matrix == "model.layers.1.mlp.up_proj.weight"
    assert "more than the 2 directions of its projectors" in failed.meaning


@pytest.mark.slow
def test_muon_moves_every_direction_alike(tmp_path):
    recorder = RecorderCallback(tmp_path / "run.zarr", every=1)
    config = config_of("muon", max_steps=3)
    train(config, random_data(), tmp_path, callbacks=[recorder])
    run = dy.open_run(tmp_path / "run.zarr")
    steps = dy.analyze(run, kinds=["optimizer_update"], select="*_proj").isel(step=slice(1, None))
    tall = np.maximum(1, steps["rows"] / steps["cols"]) ** 0.5
    largest = steps["singular_value"].isel(index=0) / tall
    assert float(largest.max()) <= 1.21 * config.learning_rate
    moved = steps["proportional_effective_rank"].where(steps["effective_rank"] > 0)
    assert float(moved.mean()) > 0.9


def test_every_method_starts_from_the_same_function_and_has_its_fields():
    assert set(NEW) <= set(METHODS)
    for method in METHODS:
        assert {preset(method).method for preset in PRESETS.values()} == {method}
    with pytest.raises(DynamicsError, match=r"weight_decay is 0\.1; it must be 0 with"):
        replace(micro("galore"), weight_decay=0.1)
    with pytest.raises(DynamicsError, match="muon is not in the published code"):
        as_published(micro("muon"))


@pytest.mark.slow
def test_a_run_that_was_started_before_there_were_these_fields_is_still_read(tmp_path):
    config, data = tiny_config(method="full_rank", max_steps=2), random_data()
    train(config, data, tmp_path)
    stored = json.loads((tmp_path / CONFIG_NAME).read_text())
    for new in ("other_learning_rate", "projection_scale", "sparsity"):
        del stored[new]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(stored))
    with pytest.raises(DynamicsError, match="trained to its end"):
        train(config, data, tmp_path, resume=True)
    known = read_identity(tmp_path / CONFIG_NAME)
    assert {name: known[name] for name in asdict(config)} == {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
    }
