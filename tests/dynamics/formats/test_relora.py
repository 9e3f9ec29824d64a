import json
import shutil

import numpy as np
import pytest

import dynamics as dy
from dynamics.formats.relora import ReLoRARun
from dynamics.runs.run import Factored
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.dynamics.formats.writers.low_rank import (  # noqa: E402
    effective_weights,
    low_rank_layers,
    randomize,
)
from tests.dynamics.formats.writers.original_relora import save_relora, with_relora  # noqa: E402

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tiny_llama):
    def build(**options):
        made = with_relora(tiny_llama(num_hidden_layers=1), **options)
        randomize(made, seed=1)
        return made

    return build


def check(run, step, model):
    """Weight, base and adapter of every matrix are those that the model computes with."""
    expected = effective_weights(model)
    assert set(run.matrices) == set(expected)
    for name, weight in expected.items():
        found = run.read(name, step, "weight")
        assert found.shape == weight.shape == (run.matrices[name].rows, run.matrices[name].cols)
        np.testing.assert_allclose(found.values, weight, rtol=1e-12, atol=1e-14)
    for name, layer in low_rank_layers(model).items():
        a, b = (each.weight.detach().double().numpy() for each in layer.factors)
        adapter = run.read(name, step, "adapter")
        assert isinstance(adapter, Factored)
        np.testing.assert_array_equal(adapter.left, b)
        np.testing.assert_array_equal(adapter.right, a)
        assert adapter.scale == pytest.approx(layer.scale, rel=1e-12)
        base = run.read(name, step, "base")
        if layer.weight is None:
            assert base is None
        else:
            np.testing.assert_array_equal(base.values, layer.weight.detach().numpy())


@pytest.mark.parametrize("pickled", [False, True])
def test_weight_base_and_adapter_are_those_of_the_model(model, tmp_path, pickled):
    save_relora(model(), tmp_path, 1000, pickled=pickled)
    run = dy.open_run(tmp_path)
    assert isinstance(run, ReLoRARun)
    assert run.steps.tolist() == [1000]
    assert run.kinds[:3] == ("weight", "base", "adapter")
    assert run.attrs["config"]["hidden_size"] == 16
    assert run.attrs["relora_config"]["lora_alpha"] == 32
    check(run, 1000, model())


def test_a_trained_scaling_is_its_tanh(model, tmp_path):
    trained = model(trained=True)
    directory = save_relora(trained, tmp_path, 5)
    assert json.loads((directory / "relora_config.json").read_text())["trainable_scaling"] is False
    layers = low_rank_layers(trained)
    scales = {layer.scaling.item() for layer in layers.values()}
    assert len(scales) == len(layers)
    run = dy.open_run(tmp_path)
    for name, layer in layers.items():
        expected = np.tanh(layer.scaling.item())
        assert run.read(name, 5, "adapter").scale == pytest.approx(expected, rel=1e-12)
    name, layer = next(iter(layers.items()))
    product = layer.double().effective() - layer.weight.detach().double().numpy()
    np.testing.assert_allclose(run.read(name, 5, "adapter").product(), product, rtol=1e-5)


def test_a_model_of_factors_alone_has_their_product_as_weight(model, tmp_path):
    alone = model(with_weight=False)
    save_relora(alone, tmp_path, 5, keep_original_weights=False)
    check(dy.open_run(tmp_path), 5, alone)


def test_the_state_is_along_the_steps(model, tmp_path):
    for step in (10, 20):
        save_relora(model(), tmp_path, step)
    analysis = dy.analyze(tmp_path, metrics=["stable_rank"], select="*q_proj")
    assert analysis["tokens"].values.tolist() == [1000, 2000]
    assert analysis["update_step"].values.tolist() == [10, 20]
    assert analysis["global_step"].values.tolist() == [20, 40]
    assert (analysis["status"].sel(kind="adapter") == dy.Status.MEASURED).all()


@pytest.mark.parametrize(("restarts", "expected"), [(3, 3), (0, 1)])
def test_merges_between_are_those_counted_and_one_where_the_base_changed(
    model, tmp_path, restarts, expected
):
    trained = model()
    save_relora(trained, tmp_path, 10)
    save_relora(trained, tmp_path, 20)
    for layer in low_rank_layers(trained).values():
        layer.merge()
    save_relora(trained, tmp_path, 30, restarts=restarts)
    run = dy.open_run(tmp_path)
    assert run.merges_between(Q_PROJ, 10, 20) == 0
    assert run.merges_between(Q_PROJ, 10, 30) == expected
    assert run.merges_between("lm_head.weight", 10, 30) == 0
    before, after = (run.read(Q_PROJ, step, "weight").values for step in (20, 30))
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_a_full_rank_run_of_the_same_script_has_weights(tiny_llama, tmp_path):
    model = tiny_llama()
    save_relora(model, tmp_path, 10)
    assert not (tmp_path / "model_10/relora_config.json").exists()
    run = dy.open_run(tmp_path)
    assert run.format == "relora"
    assert run.stored_kinds == ("weight",)
    parameters = model.named_parameters()
    assert_bits(run, 10, {name: each.detach() for name, each in parameters if each.ndim == 2})


def test_one_checkpoint_may_be_opened(model, tmp_path):
    directory = save_relora(model(), tmp_path, 7)
    check(dy.open_run(directory), 7, model())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quantize": "4bit"}, "quantised to '4bit'"),
        ({"lora_alpha": None}, "lora_alpha None, expected a number"),
        ({"r": 8}, "rank r = 8, but .* has factors of rank 4"),
    ],
)
def test_a_config_that_cannot_be_served_is_named(model, tmp_path, config, match):
    save_relora(model(), tmp_path, 10, **config)
    assert_refused(tmp_path, match)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("relora_config.json", "{", r"relora_config\.json is not readable JSON"),
        ("training_state.json", "[]", r"training_state\.json holds a JSON list"),
        ("config.json", "", r"config\.json is not readable JSON"),
        ("model.safetensors", "", r"model\.safetensors .*truncated or damaged"),
        ("relora_config.json", None, r"LoRA factors but no relora_config\.json"),
        ("model.safetensors", None, r"holds no model\.safetensors or pytorch_model\.bin"),
    ],
)
def test_a_damaged_checkpoint_is_a_problem_of_its_step(model, tmp_path, file, content, match):
    save_relora(model(), tmp_path, 10)
    damaged = save_relora(model(), tmp_path, 20) / file
    damaged.unlink() if content is None else damaged.write_text(content)
    assert_problem(dy.open_run(tmp_path), 20, match)


@pytest.mark.parametrize(
    ("part", "shape", "match"),
    [
        ("lora_B", None, r"holds lora_A of .* only"),
        ("lora_B", (16, 3), "no rank in common"),
        ("lora_B", (17, 4), r"in shape \(16, 16\), but the adapter .* fits \(17, 16\)"),
    ],
)
def test_factors_that_do_not_fit_are_named(model, tmp_path, part, shape, match):
    from safetensors.numpy import load_file, save_file

    file = save_relora(model(), tmp_path, 10) / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.0.self_attn.q_proj.{part}.weight"
    del tensors[name]
    if shape is not None:
        tensors[name] = np.zeros(shape, np.float32)
    save_file(tensors, file)
    assert_refused(tmp_path, match)


def test_two_checkpoints_of_one_step_are_its_problem(model, tmp_path):
    for step in (5, 10):
        save_relora(model(), tmp_path, step)
    (tmp_path / "model_010").mkdir()
    assert list(dy.open_run(tmp_path).problems) == []  # the empty one is none
    shutil.copytree(tmp_path / "model_10", tmp_path / "model_010", dirs_exist_ok=True)
    assert_problem(dy.open_run(tmp_path), 10, "holds model_010 and model_10, both of step 10")


def test_a_trained_scaling_of_zero_makes_a_dead_adapter(model, tmp_path):
    """What the original's merge leaves: it sets a trained scaling to zero."""
    trained = model(trained=True)
    for layer in low_rank_layers(trained).values():
        layer.scaling.data.zero_()
    save_relora(trained, tmp_path, 10)
    adapter = dy.open_run(tmp_path).read(Q_PROJ, 10, "adapter")
    assert adapter.scale == 0.0
    assert not adapter.product().any()


def test_a_directory_of_another_kind_is_refused_when_forced(llama_checkpoints):
    assert_refused(llama_checkpoints, "holds no directory model_N/", format="relora")
