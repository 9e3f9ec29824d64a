"""Runs of SLTrain: facts of the method, recording and checkpoints alike, and planted defects."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import dynamics as dy
from dynamics.errors import FormatError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import train
from probes.relora.evaluation.trained_models import load_model
from probes.relora.layers.sltrain import SLTrainLinear
from tests.probes.relora.conftest import random_data, tiny_config

pytestmark = pytest.mark.slow

RANK = 2


class AfterStep(TrainerCallback):
    """Does something to one layer after one step."""

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.change(model.model.layers[1].mlp.up_proj)


def trained(folder, seed=3, *callbacks):
    config = tiny_config(
        method="sltrain", seed=seed, lora_rank=RANK, weight_decay=0.0, max_steps=6, sparsity=0.1
    )
    recorder = RecorderCallback(folder / "run.zarr", every=2)
    train(config, random_data(), folder, callbacks=[*callbacks, recorder])
    return config


@pytest.mark.parametrize("method", ["sltrain", "cola"])
def test_a_checkpoint_of_other_layers_is_evaluated_as_what_it_is(tmp_path, method):
    config = tiny_config(method=method, max_steps=2, save_every=2)
    model = train(config, random_data(), tmp_path).model.eval()
    loaded = load_model(tmp_path / "checkpoint-2")
    tokens = random_data().validation.blocks
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    moved = (tmp_path / "checkpoint-2").rename(tmp_path.parent / f"{tmp_path.name}-alone")
    with pytest.raises(FormatError, match=r"lacks 14 weights of LlamaForCausalLM, such as .*proj"):
        load_model(moved)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_method_forces_holds_in_recording_and_checkpoints_alike(tmp_path, seed):
    config = trained(tmp_path, seed)
    recorded, saved = (
        dy.open_run(tmp_path / "run.zarr"),
        dy.open_run(tmp_path, format="checkpoints"),
    )
    for run in (recorded, saved):
        report = dy.audit(run)
        assert not report.failed, report.line
        assert len(report.of("sparse_support")) == 14
    assert len(dy.audit(recorded).of("rank_bound")) == 14
    layers = [name for name in recorded.matrices if name.endswith("proj.weight")]
    assert len(layers) == 14
    for name in layers:
        info = recorded.matrices[name]
        entries = int(config.sparsity * info.rows * info.cols)
        assert recorded.sparse_entries(name) == saved.sparse_entries(name) == entries
        first = {kind: recorded.read(name, 0, kind) for kind in ("weight", "base")}
        np.testing.assert_array_equal(first["weight"].values, first["base"].values)
        for step in (2, 4, 6):
            weight, base, adapter = (
                recorded.read(name, step, kind) for kind in ("weight", "base", "adapter")
            )
            places = first["base"].values != 0
            assert places.sum() == entries
            np.testing.assert_array_equal(base.values != 0, places)
            s = np.linalg.svd(weight.values - base.values.astype(np.float64), compute_uv=False)
            assert s[RANK] < 1e-6 * s[0]
            assert s[RANK - 1] > 1e-3 * s[0]
            for kind, own in (("base", base), ("adapter", adapter)):
                other = saved.read(name, step, kind)
                for part in ("values",) if kind == "base" else ("left", "right", "scale"):
                    np.testing.assert_array_equal(getattr(other, part), getattr(own, part))
            np.testing.assert_allclose(
                saved.read(name, step, "weight").values, weight.values, rtol=1e-6, atol=1e-8
            )


def other_places(layer):
    layer.sparse_index.copy_(torch.arange(len(layer.sparse_index)))


def a_third_term(layer):
    class WithMore(SLTrainLinear):
        @property
        def weight(self):
            return super().weight + 1e-3 * torch.eye(self.out_features, self.in_features)

    layer.__class__ = WithMore


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (other_places, "sparse_support", "its support changed"),
        (a_third_term, "rank_bound", "W - S has more than r = 2 directions"),
    ],
)
def test_a_planted_violation_is_named_by_the_audit_alone(tmp_path, change, check, words):
    trained(tmp_path, 3, AfterStep(3, change))
    failed = [each for each in dy.audit(tmp_path / "run.zarr").verdicts if each.severity == "fail"]
    assert [(each.check, each.matrix) for each in failed] == [
        (check, "model.layers.1.mlp.up_proj.weight")
    ]
    assert words in failed[0].meaning
    assert failed[0].step >= 4
