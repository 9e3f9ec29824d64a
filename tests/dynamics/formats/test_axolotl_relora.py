"""axolotl's ReLoRA: PEFT checkpoints with relora/ and adapter/, written as its callback does.

axolotl is too heavy to install. `Training` calls PEFT, transformers and safetensors in the order
of `ReLoRACallback` in src/axolotl/monkeypatch/relora.py (axolotl-ai-cloud/axolotl): `on_save` after
a step, `on_step_begin` before the next.
"""

import glob
import json
import os
import shutil

import numpy as np
import pytest

import dynamics as dy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from tests.dynamics.formats.writers.lora import adapted, randomized, save  # noqa: E402

EVERY = 4
SAVED = (2, 4, 6, 8, 10)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
V_PROJ = "model.layers.0.self_attn.v_proj.weight"


class Training:
    """A ReLoRA run in `directory/run` that merges after every fourth step and saves every second.

    Attributes:
        weights: step -> name -> float64 weights that the model computed with when it was saved.
        bases: step -> name -> float64 weights without adapters then.
    """

    def __init__(self, model, directory, quantized, shard_size):
        self.source = directory / "base"
        self.output = directory / "run"
        model.save_pretrained(self.source, max_shard_size=shard_size)
        self.quantized = quantized
        self.last_full_model = str(self.source)
        self.model = adapted(model)
        self.model.peft_config["default"].base_model_name_or_path = str(self.source)
        self.weights, self.bases = {}, {}
        for step in range(1, max(SAVED) + 1):
            if step > 1 and (step - 1) % EVERY == 0:
                self.on_step_begin(step - 1)
            randomized(self.model, seed=step)
            if step in SAVED:
                save(self.model, self.checkpoint(step))
                self.on_save(step)
                self.remember(step)

    def checkpoint(self, step):
        return self.output / f"checkpoint-{step}"

    def layers(self):
        found = self.model.model.named_modules()
        return {name: each for name, each in found if isinstance(each, peft.tuners.lora.LoraLayer)}

    def remember(self, step):
        state = self.model.model.state_dict()
        bases = {
            name.replace(".base_layer.", "."): each.double().numpy().copy()
            for name, each in state.items()
            if "lora_" not in name and each.ndim == 2
        }
        deltas = {
            f"{name}.weight": layer.scaling["default"]
            * (
                layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
            ).detach()
            for name, layer in self.layers().items()
        }
        self.bases[step] = bases
        self.weights[step] = {
            name: base + deltas[name].numpy() if name in deltas else base
            for name, base in bases.items()
        }

    def on_save(self, step):
        folder = self.checkpoint(step) / "relora"
        if step < EVERY or step % EVERY == 0:
            return
        if not self.quantized:
            self.model.model.save_pretrained(folder, safe_serialization=True)
            return
        os.makedirs(folder, exist_ok=True)
        for path in glob.glob(f"{self.last_full_model}/model*"):
            os.symlink(os.path.abspath(shutil.move(path, folder)), path)
        self.last_full_model = str(folder)

    def on_step_begin(self, step):
        save(self.model, self.checkpoint(step) / "adapter")
        with torch.no_grad():
            if self.quantized:
                self.merge_and_save(self.checkpoint(step) / "relora")
            else:
                for layer in self.layers().values():
                    layer.weight.data += layer.get_delta_weight("default").detach()
        for layer in self.layers().values():
            layer.reset_lora_parameters("default", True)

    def merge_and_save(self, folder):
        os.makedirs(folder, exist_ok=True)
        layers, weight_map = self.layers(), {}
        for shard in sorted(glob.glob(f"{self.last_full_model}/model*.safetensors")):
            tensors = safetensors_torch.load_file(shard)
            for name, layer in layers.items():
                if f"{name}.weight" in tensors:
                    new = tensors[f"{name}.weight"] + layer.get_delta_weight("default")
                    tensors[f"{name}.weight"] = new
                    layer.weight.data = new.half().float()  # in 4 bits with bitsandbytes
            weight_map |= dict.fromkeys(tensors, os.path.basename(shard))
            halves = {name: each.half() for name, each in tensors.items()}
            safetensors_torch.save_file(halves, folder / os.path.basename(shard))
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.last_full_model = str(folder)


@pytest.fixture
def training(tiny_llama, tmp_path):
    def train(quantized, shard_size="1GB"):
        model = tiny_llama(num_hidden_layers=1)
        if quantized:
            model = model.half().float()  # so that half precision is exact but for merges
        return Training(model, tmp_path, quantized, shard_size)

    return train


def test_unquantised_training_is_read_exactly(training):
    trained = training(quantized=False)
    stored = safetensors_torch.load_file(trained.checkpoint(6) / "relora/model.safetensors")
    assert f"{Q_PROJ.removesuffix('.weight')}.base_layer.weight" in stored
    assert any("lora_A.default" in name for name in stored)
    assert not (trained.checkpoint(8) / "relora").exists()

    run = dy.open_run(trained.output)
    assert run.steps.tolist() == list(SAVED)
    assert dict(run.problems) == {}
    assert set(run.matrices) == set(trained.weights[2])
    for step in SAVED:
        for name, expected in trained.weights[step].items():
            found = run.read(name, step, "weight").values
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
            base = run.read(name, step, "base").values
            np.testing.assert_array_equal(base, trained.bases[step][name])


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_quantised_training_has_its_merged_weights_where_it_merged(training, shard_size):
    trained = training(quantized=True, shard_size=shard_size)
    assert any(each.is_symlink() for each in (trained.checkpoint(4) / "relora").iterdir())
    run = dy.open_run(trained.output)
    assert dict(run.problems) == {}
    for step in SAVED:
        merged = step % EVERY == 0
        for name, expected in trained.weights[step].items():
            found = run.read(name, step, "weight")
            if merged:  # in half precision, after the merge; not with the adapter once more
                expected = expected.astype(np.float16)
                assert found.dtype == "float16"
            np.testing.assert_allclose(
                found.values.astype(np.float64), expected, rtol=2e-3 * merged + 1e-12, atol=1e-6
            )
        base = run.read(Q_PROJ, step, "base")
        assert (base is None) == merged
        if base is not None:
            np.testing.assert_array_equal(base.values, trained.bases[step][Q_PROJ])
        adapter = run.read(Q_PROJ, step, "adapter").product()
        assert adapter.any()


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_merges_are_counted(training, quantized):
    run = dy.open_run(training(quantized).output)
    assert [run.merges_between(Q_PROJ, 2, step) for step in SAVED] == (
        [0, 1, 1, 2, 2] if quantized else [0, 0, 1, 1, 2]  # at or after the checkpoint of a merge
    )
    assert run.merges_between(V_PROJ, 2, 10) == 0  # has no adapter


def test_a_cycle_whose_weights_no_checkpoint_has_says_so(training):
    trained = training(quantized=False)
    shutil.rmtree(trained.checkpoint(6))
    message = (
        "checkpoint-8 holds only an adapter that was saved after a merge; no checkpoint between"
    )
    with pytest.raises(dy.DynamicsError, match=message) as caught:
        dy.analyze(trained.output)
    assert "\n" not in str(caught.value)
    analysis = dy.analyze(trained.output, kinds=["adapter"], metrics=["effective_rank"])
    assert analysis["step"].values.tolist() == [2, 4, 8, 10]


def test_deleted_checkpoints_do_not_bring_the_first_base_back(training):
    trained = training(quantized=False)
    for step in (2, 4):
        shutil.rmtree(trained.checkpoint(step))
    found = dy.open_run(trained.output).read(Q_PROJ, 8, "weight").values
    np.testing.assert_allclose(found, trained.weights[8][Q_PROJ], rtol=1e-12, atol=1e-14)
    shutil.rmtree(trained.checkpoint(6))
    shutil.rmtree(trained.checkpoint(10))
    log = {"global_step": 8, "log_history": [{"step": 8, "num_lora_restarts": 1}]}
    (trained.checkpoint(8) / "trainer_state.json").write_text(json.dumps(log))
    assert dy.open_run(trained.output).kinds == ("adapter",)


def test_it_is_measured(training):
    trained = training(quantized=False)
    analysis = dy.analyze(trained.output, metrics=["frobenius_norm"], select="*q_proj")
    change = trained.weights[8][Q_PROJ] - trained.weights[6][Q_PROJ]
    found = analysis["frobenius_norm"].sel(kind="update", step=8, matrix=Q_PROJ)
    np.testing.assert_allclose(float(found), np.linalg.norm(change), rtol=1e-10)
    assert json.loads(analysis.attrs["problems"]) == []
