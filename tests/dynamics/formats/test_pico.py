import re
import shutil

import numpy as np
import pytest
import yaml

import dynamics as dy
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused

torch = pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")
pytest.importorskip("transformers")

from tests.dynamics.formats.writers.low_rank import (  # noqa: E402
    effective_weights,
    low_rank_layers,
    randomize,
)
from tests.dynamics.formats.writers.pico import (  # noqa: E402
    SUFFIXES,
    decoder,
    save_config,
    save_dynamics,
    save_model,
)

V_PROJ = "layers.0.attention.v_proj.weight"


def matrices(model):
    return {name: each.detach() for name, each in model.named_parameters() if each.ndim == 2}


@pytest.fixture
def trained(tmp_path):
    """(run, models by step): models at steps 0 and 5, gradients of train and val, as pico-train."""
    run = tmp_path / "runs/tiny"
    save_config(run)
    models = {step: decoder(seed=step) for step in (0, 5)}
    for step, model in models.items():
        save_model(model, run, step)
        for seed, split in enumerate(("train", "val")):
            save_dynamics(model, run, step, split, seed=seed)
    return run, models


def test_a_run_is_read_from_its_model_files(trained):
    run, models = trained
    opened = dy.open_run(run)
    assert opened.format == "pico"
    assert opened.steps.tolist() == [0, 5]
    assert opened.stored_kinds == ("weight", "gradient")
    for step, model in models.items():
        assert_bits(opened, step, matrices(model))
    rows = {(each.layer, each.module) for each in opened.matrices.values()}
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert rows == {(layer, module) for layer in (0, 1) for module in modules} | {
        (None, "embed_tokens"),
        (None, "lm_head"),
    }


def test_gradients_are_those_of_the_training_batch(trained):
    run, models = trained
    _, expected = save_dynamics(models[5], run, 5, "train", seed=0)
    _, val = save_dynamics(models[5], run, 5, "val", seed=1)
    assert all(name.startswith("_forward_module.layers.") for name in expected)
    opened = dy.open_run(run)
    found = {name: opened.read(name, 5, "gradient") for name in opened.matrices}
    found = {name: each for name, each in found.items() if each is not None}
    assert len(found) == len(expected) == 2 * len(SUFFIXES)
    for name, gradient in expected.items():
        values = found[name.removeprefix("_forward_module.") + ".weight"].values
        np.testing.assert_array_equal(values, gradient.numpy())
        assert not np.array_equal(values, val[name].numpy())
    assert "train batch" in opened.attrs["gradient"]


def test_gradients_of_the_validation_batch_are_read_where_there_are_no_others(trained):
    run, models = trained
    for each in run.glob("checkpoints/*/learning_dynamics/train_gradients.pt"):
        each.unlink()
    _, expected = save_dynamics(models[5], run, 5, "val", seed=1)
    opened = dy.open_run(run)
    expected_v0 = expected["_forward_module.layers.0.attention.v_proj"].numpy()
    np.testing.assert_array_equal(opened.read(V_PROJ, 5, "gradient").values, expected_v0)
    assert "val batch" in opened.attrs["gradient"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_weights_of_learning_dynamics_are_read_where_there_is_no_model(tmp_path, split):
    model = decoder()
    weights, _ = save_dynamics(model, tmp_path, 5, split)
    opened = dy.open_run(tmp_path)
    assert opened.steps.tolist() == [5]
    assert len(weights) == 2 * len(SUFFIXES)
    expected = {name: each for name, each in matrices(model).items() if name in opened.matrices}
    assert len(expected) == len(weights)
    assert_bits(opened, 5, expected)


@pytest.mark.parametrize("at", ["", "checkpoints", "checkpoints/step_5"])
def test_the_run_its_checkpoints_and_one_step_may_be_opened(trained, at):
    run, models = trained
    opened = dy.open_run(run / at)
    assert opened.format == "pico"
    assert opened.steps.tolist() == ([5] if at.endswith("step_5") else [0, 5])
    assert opened.attrs["config"]["attention_n_kv_heads"] == 2
    assert_bits(opened, 5, matrices(models[5]))


def test_it_is_measured_with_its_circuits(trained):
    run, models = trained
    analysis = dy.analyze(run, metrics=["frobenius_norm"], components=["parameters", "ov_circuit"])
    model = models[5].layers[1].attention
    o, v = (each.weight.detach().double().numpy() for each in (model.o_proj, model.v_proj))
    expected = np.linalg.norm(o[:, 12:] @ v[4:])  # the last of four heads, the second of two
    of_head = analysis.isel(
        matrix=(analysis["component"] == "ov_circuit").values
        & (analysis["layer"] == 1).values
        & (analysis["head"] == 3).values
    )
    found = of_head["frobenius_norm"].sel(kind="weight", step=5).item()
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    moved = (
        models[5].de_embedding_proj.weight.double() - models[0].de_embedding_proj.weight.double()
    )
    update = analysis["frobenius_norm"].sel(
        kind="update", step=5, matrix="de_embedding_proj.weight"
    )
    np.testing.assert_allclose(float(update), float(moved.detach().norm()), rtol=1e-10)


def test_the_config_of_the_model_serves_where_the_runs_is_missing(trained):
    run, _ = trained
    (run / "training_config.yaml").unlink()
    assert dy.open_run(run).attrs["config"]["attention_n_heads"] == 4


# relora-pico -------------------------------------------------------------------------------------


@pytest.fixture
def relora(tmp_path):
    """relora(**options): (run with a model with factors at step 5, that model)."""

    def save(*, config=True, **options):
        run = tmp_path / "runs/relora"
        model = decoder(**(options or {"r": 3}))
        randomize(model, seed=2)
        if config:
            save_config(run, **(options or {"r": 3}))
        save_model(model, run, 5, **(options or {"r": 3}))
        return run, model

    return save


@pytest.mark.parametrize("options", [{}, {"r": 2, "lora_alpha": 5}, {"lora_only": True}], ids=str)
@pytest.mark.parametrize("config", [True, False])
def test_weight_base_and_adapter_are_those_of_the_model(relora, options, config):
    run, model = relora(config=config, **options)
    opened = dy.open_run(run)
    expected = effective_weights(model)
    assert set(opened.matrices) == set(expected)
    for name, weight in expected.items():
        found = opened.read(name, 5, "weight").values
        np.testing.assert_allclose(found, weight, rtol=1e-12, atol=1e-14)
    for name, layer in low_rank_layers(model).items():
        adapter, base = opened.read(name, 5, "adapter"), opened.read(name, 5, "base")
        assert adapter.rank_bound == options.get("r", 3)
        assert adapter.scale == layer.scale
        assert (base is None) == bool(options.get("lora_only"))
        if base is not None:
            np.testing.assert_array_equal(base.values, layer.weight.detach().numpy())


def test_a_trained_scaling_is_its_tanh(relora):
    run, model = relora(trainable_scaling=True)
    name, layer = next(iter(low_rank_layers(model).items()))
    found = dy.open_run(run).read(name, 5, "adapter").scale
    assert found == pytest.approx(np.tanh(layer.s.item()), rel=1e-12)


def test_factors_of_learning_dynamics_are_adapters(relora):
    run, model = relora()
    _, gradients = save_dynamics(model, run, 5, "train")
    shutil.rmtree(run / "checkpoints/step_5")
    save_dynamics(model, run, 5, "train")
    opened = dy.open_run(run)
    expected = effective_weights(model)
    assert opened.stored_kinds == ("weight", "base", "adapter", "gradient")
    np.testing.assert_allclose(
        opened.read(V_PROJ, 5, "weight").values, expected[V_PROJ], atol=1e-14
    )
    np.testing.assert_array_equal(
        opened.read(V_PROJ, 5, "base").values, low_rank_layers(model)[V_PROJ].weight.numpy()
    )
    a = V_PROJ.replace(".weight", ".A_lora.weight")
    np.testing.assert_array_equal(
        opened.read(a, 5, "gradient").values,
        gradients["_forward_module.layers.0.attention.v_proj.A_lora"].numpy(),
    )
    assert opened.read(a, 5, "weight") is None
    assert opened.read(V_PROJ, 5, "gradient") is None  # frozen
    analysis = dy.analyze(run, metrics=["stable_rank"])
    assert (analysis["status"].sel(kind="adapter", matrix=V_PROJ) == dy.Status.MEASURED).all()


def test_a_trained_scaling_that_is_not_there_is_refused(relora):
    run, model = relora(trainable_scaling=True)
    shutil.rmtree(run / "checkpoints/step_5")
    save_dynamics(model, run, 5, "train")
    assert_refused(run, "without the scaling that was trained with them")


def test_factors_without_their_config_are_refused(relora):
    run, model = relora(config=False)
    shutil.rmtree(run / "checkpoints/step_5")
    save_dynamics(model, run, 5, "train")
    assert_refused(run, "holds LoRA factors, but neither training_config.yaml nor its config.json")


# Damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("model.safetensors", "truncated or damaged"),
        ("learning_dynamics/train_gradients.pt", "truncated or damaged"),
    ],
)
def test_a_truncated_file_is_a_problem_of_its_step(trained, file, match):
    damaged = trained[0] / "checkpoints/step_5" / file
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert_problem(dy.open_run(trained[0]), 5, match)


def test_a_step_with_nothing_to_read_is_a_problem(trained):
    at = trained[0] / "checkpoints/step_7"
    (at / "fabric_state").mkdir(parents=True)
    assert_problem(dy.open_run(trained[0]), 7, "holds neither a model nor learning_dynamics/")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("model: [", "not readable YAML"),
        ("!!python/object/apply:os.mkdir [x]", "not readable YAML"),
        ("[" * 5000, "not readable YAML"),
        ("training: {}", "no section 'model'"),
        ("#" * 2**21, "bytes, too many for a training config"),
    ],
    ids=["cut", "python", "deep", "other", "large"],
)
def test_a_damaged_config_is_named_and_the_weights_are_measured(trained, relora, content, match):
    (trained[0] / "training_config.yaml").write_text(content)
    run = dy.open_run(trained[0])
    assert (run.steps.tolist(), dict(run.problems)) == ([0, 5], {})
    assert re.search(match, run.passed_over["training_config.yaml"])
    with_factors, _ = relora()
    (with_factors / "training_config.yaml").write_text(content)
    assert dict(dy.open_run(with_factors).problems) == {}  # its config.json has the scaling, too
    (with_factors / "checkpoints/step_5/config.json").unlink()
    assert_refused(with_factors, match)


def test_a_config_that_would_explode_is_kept_small(trained):
    bomb = "".join(
        f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(30)
    )
    (trained[0] / "training_config.yaml").write_text(f"model:\n  d_model: 16\n{bomb}")
    assert dy.open_run(trained[0]).attrs["config"] == {"d_model": 16, "a0": ["x"] * 9}


def test_the_config_is_pico_trains(trained):
    section = yaml.safe_load((trained[0] / "training_config.yaml").read_text())["model"]
    assert dy.open_run(trained[0]).attrs["config"] == section


def test_a_directory_of_another_kind_is_refused_when_forced(llama_checkpoints):
    assert_refused(llama_checkpoints, "holds neither step_N/", format="pico")
