"""ReLoRA's probed gradients are what full-rank training would have got at the same weights."""

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.directions.adapter_subspace import expressibility
from dynamics.directions.expressibility import FactorsOf
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import train
from probes.relora.training.restart import lora_layers
from tests.probes.adapted import relative_error
from tests.probes.relora.conftest import random_data, tiny_config

pytestmark = pytest.mark.slow

MERGE_AT = 4


class _Factors(RecorderCallback):
    """Also keeps every step's A and B as its gradient sees them."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        for name, layer in lora_layers(model).items():
            clean = name.removeprefix("base_model.model.") + ".weight"
            factors = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
            self.seen[state.global_step + 1, clean] = [x.detach().clone().numpy() for x in factors]


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Both twins, 6 steps with a merge at 4, not clipped; dropout 0.1 on the adapters' input."""
    folder = tmp_path_factory.mktemp("twins")
    runs, seen = {}, {}
    for method in ("full_rank", "relora"):
        config = tiny_config(
            method=method,
            max_steps=6,
            save_every=100,
            reset_every=MERGE_AT,
            max_grad_norm=1e9,
            gradient_accumulation_steps=2,
        )
        callback = _Factors(folder / f"{method}.zarr", every=1) if method == "relora" else None
        callback = callback or RecorderCallback(folder / f"{method}.zarr", every=1)
        train(
            config,
            random_data(),
            folder / method,
            callbacks=[callback],
            on_event=callback.event,
        )
        runs[method] = dy.open_run(folder / f"{method}.zarr")
        seen[method] = getattr(callback, "seen", None)
    return runs["full_rank"], runs["relora"], seen["relora"]


def test_the_first_gradients_of_the_twins_are_equal(twins):
    full, relora, _ = twins
    for name in full.matrices:  # B is zero at the first step: the twins compute the same function
        one, other = (run.read(name, 1, "gradient").values for run in (full, relora))
        assert relative_error(other, one) < 1e-6


def test_expressibility_knows_the_factors_that_each_gradient_was_taken_at(twins):
    _, relora, seen = twins
    ds = dy.gradient_expressibility(relora)
    assert ds["step"].values.tolist() == [1, 2, 3, 4, 5, 6]
    assert (ds["factors"].sel(step=MERGE_AT + 1) == FactorsOf.RESET).all()
    assert (ds["factors"].drop_sel(step=MERGE_AT + 1) == FactorsOf.BEFORE).all()
    for (step, name), (b, a) in seen.items():
        exact = expressibility(relora.read(name, step, "gradient").values, b, a)
        found = ds.sel(step=step, matrix=name)
        # After a reset A is known up to the rounding of weight decay.
        np.testing.assert_allclose(found["share"], exact.share, rtol=1e-6)
        assert float(found["left_rank"]) == exact.left_rank
    assert (ds["left_rank"].sel(step=[1, MERGE_AT + 1]) == 0).all()
    assert (ds["left_rank"].sel(step=MERGE_AT) > 0).all()


def test_a_merge_in_an_armed_model_changes_no_bit(twins, tmp_path):
    _, relora, _ = twins
    config = tiny_config(
        max_steps=6,
        save_every=100,
        reset_every=MERGE_AT,
        max_grad_norm=1e9,
        gradient_accumulation_steps=2,
    )
    plain = train(config, random_data(), tmp_path / "plain").model
    assert not any(p.requires_grad for n, p in plain.named_parameters() if ".base_layer." in n)
    for name, layer in lora_layers(plain).items():
        clean = name.removeprefix("base_model.model.") + ".weight"
        with torch.no_grad():
            weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        np.testing.assert_array_equal(relora.read(clean, 6, "weight").values, weight.numpy())
