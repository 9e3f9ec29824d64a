import json
import shutil

import numpy as np
import pytest

import dynamics as dy
from dynamics import schema
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


def two_dimensional(model):
    """Name -> (values in an exact dtype, stored dtype); the model's own words."""
    return {
        name: (parameter.detach().double().numpy(), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
    }


def two_dimensional_tensors(model):
    """Name -> parameter of every matrix, tied ones once."""
    return {name: each.detach() for name, each in model.named_parameters() if each.ndim == 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
def test_values_are_the_models_parameters_exactly(tiny_llama, tmp_path, dtype, shard_size):
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path / "checkpoint-7", max_shard_size=shard_size)
    sharded = (tmp_path / "checkpoint-7/model.safetensors.index.json").is_file()
    assert sharded == (shard_size == "8KB")

    run = dy.open_run(tmp_path)
    assert run.format == "checkpoints"
    assert run.steps.tolist() == [7]
    expected = two_dimensional(model)
    assert set(run.matrices) == set(expected)
    for name, (values, stored) in expected.items():
        found = run.read(name, 7, schema.WEIGHT)
        assert found is not None
        assert found.dtype == stored
        assert found.shape == values.shape == (run.matrices[name].rows, run.matrices[name].cols)
        np.testing.assert_array_equal(found.values.astype(np.float64), values)


def test_matrices_know_their_layer_and_module(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "checkpoint-1")
    analysis = dy.analyze(tmp_path, metrics=["stable_rank"])
    rows = {
        name: (int(analysis["layer"][i]), analysis["module"].values[i])
        for i, name in enumerate(analysis["matrix"].values.tolist())
    }
    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    expected = {
        f"model.layers.{layer}.self_attn.{module}.weight": (layer, module)
        for layer in (0, 1)
        for module in modules
    } | {
        f"model.layers.{layer}.mlp.{module}.weight": (layer, module)
        for layer in (0, 1)
        for module in ("gate_proj", "up_proj", "down_proj")
    }
    expected["model.embed_tokens.weight"] = (schema.NO_LAYER, "embed_tokens")
    expected["lm_head.weight"] = (schema.NO_LAYER, "lm_head")
    assert rows == expected
    k_proj = analysis.sel(matrix="model.layers.0.self_attn.k_proj.weight")
    assert (int(k_proj["rows"]), int(k_proj["cols"])) == (8, 16)


def test_tied_weights_are_measured_once(tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "checkpoint-1")
    names = list(dy.open_run(tmp_path).matrices)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names)) == 15


def test_update_and_displacement_are_the_float64_differences(llama_checkpoints):
    run = dy.open_run(llama_checkpoints)
    analysis = dy.analyze(run, kinds=["update", "displacement"])
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {
        step: two_dimensional(
            transformers.LlamaForCausalLM.from_pretrained(llama_checkpoints / f"checkpoint-{step}")
        )[name][0]
        for step in (2, 4, 6)
    }
    of_matrix = analysis.sel(matrix=name)
    for kind, step, before in (("update", 4, 2), ("update", 6, 4), ("displacement", 6, 2)):
        expected = np.linalg.svd(weights[step] - weights[before], compute_uv=False)
        found = of_matrix["singular_value"].sel(kind=kind, step=step).dropna("index").values
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (of_matrix["status"].sel(step=2) == schema.Status.UNDEFINED).all()
    assert of_matrix["singular_value"].sel(step=2).isnull().all()


def test_an_update_does_not_depend_on_the_steps_selected(llama_checkpoints):
    every = dy.analyze(llama_checkpoints, metrics=["frobenius_norm"])
    last = dy.analyze(llama_checkpoints, metrics=["frobenius_norm"], steps=[6])
    np.testing.assert_array_equal(
        last["frobenius_norm"].values, every["frobenius_norm"].sel(step=[6]).values
    )


def test_a_parameter_that_one_checkpoint_lacks_is_not_recorded_there(tiny_llama, tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "checkpoint-1")
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "checkpoint-2")
    analysis = dy.analyze(tmp_path, kinds=["weight"])
    status = analysis["status"].sel(matrix="model.layers.1.mlp.up_proj.weight", kind="weight")
    assert status.values.tolist() == [schema.Status.NOT_RECORDED, schema.Status.MEASURED]


@pytest.mark.parametrize("name", ["model", "checkpoint-12"])
def test_a_single_model_directory_is_one_checkpoint(tiny_llama, tmp_path, name):
    model = tiny_llama()
    model.save_pretrained(tmp_path / name)
    run = dy.open_run(tmp_path / name)
    assert run.steps.tolist() == [12 if name == "checkpoint-12" else 0]
    found = run.read("lm_head.weight", int(run.steps[0]), schema.WEIGHT)
    np.testing.assert_array_equal(found.values, model.lm_head.weight.detach().numpy())
    assert run.attrs["config"]["hidden_size"] == 16


def test_steps_are_sorted_as_numbers(tiny_llama, tmp_path):
    for step in (100, 20, 3):
        tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / f"checkpoint-{step}")
    assert dy.open_run(tmp_path).steps.tolist() == [3, 20, 100]


def test_where_both_forms_lie_the_single_file_counts_as_it_does_for_transformers(
    tiny_llama, tmp_path
):
    old, new = tiny_llama(0), tiny_llama(1)
    old.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    new.save_pretrained(tmp_path / "checkpoint-1")
    for file in (tmp_path / "sharded").glob("model*"):
        shutil.copy(file, tmp_path / "checkpoint-1")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    found = dy.open_run(tmp_path / "checkpoint-1").read("lm_head.weight", 1, schema.WEIGHT)
    np.testing.assert_array_equal(found.values, loaded.lm_head.weight.detach().numpy())


def test_gpt2_weights_are_read_in_their_stored_orientation(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "checkpoint-1")
    run = dy.open_run(tmp_path, split_fused=False)
    info = run.matrices["transformer.h.0.attn.c_attn.weight"]
    assert (info.rows, info.cols, info.layer, info.module) == (16, 48, 0, "qkv_proj")
    found = run.read(info.name, 1, schema.WEIGHT)
    expected = model.transformer.h[0].attn.c_attn.weight.detach().numpy()
    np.testing.assert_array_equal(found.values, expected)


@pytest.fixture(params=["1GB", "8KB"])
def pickled(request, tiny_llama, tmp_path):
    """pickled(model): a run whose checkpoint-1 has .bin files, as transformers 4 wrote them."""

    def save(**config):
        model = tiny_llama(**config)
        huggingface_hub.save_torch_state_dict(
            model.state_dict(),
            tmp_path / "run/checkpoint-1",
            max_shard_size=request.param,
            safe_serialization=False,
        )
        model.config.save_pretrained(tmp_path / "run/checkpoint-1")
        index = tmp_path / "run/checkpoint-1/pytorch_model.bin.index.json"
        assert index.is_file() == (request.param == "8KB")
        return tmp_path / "run", model

    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    return save


def test_pickled_weights_are_read(pickled):
    directory, model = pickled()
    assert_bits(dy.open_run(directory), 1, two_dimensional_tensors(model))


def test_tied_weights_in_pickled_files_are_measured_once(pickled):
    directory, model = pickled(tie_word_embeddings=True)
    assert "lm_head.weight" in model.state_dict()
    assert_bits(dy.open_run(directory), 1, two_dimensional_tensors(model))


def test_weights_pickled_by_torch_before_1_6_are_read(tiny_llama, tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    (tmp_path / "checkpoint-1").mkdir()
    file = tmp_path / "checkpoint-1/pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_bits(dy.open_run(tmp_path), 1, two_dimensional_tensors(model))


def test_a_missing_shard_of_pickled_weights_is_named(pickled):
    directory, _ = pickled()
    shards = sorted((directory / "checkpoint-1").glob("*-of-*.bin"))
    if not shards:
        (directory / "checkpoint-1/pytorch_model.bin").unlink()
        assert_refused(directory, "holds no run of a known format")
    else:
        shards[0].unlink()
        assert_refused(directory, f"lacks the shard {shards[0].name}")


def test_a_truncated_pickle_is_named(pickled):
    directory, _ = pickled()
    file = sorted((directory / "checkpoint-1").glob("*.bin"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(directory, f"{file.name} .*truncated or damaged")


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_config_makes_its_checkpoint_a_problem(llama_checkpoints, tmp_path, content):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    (run / "checkpoint-4/config.json").write_text(content, encoding="latin-1")
    opened = dy.open_run(run)
    assert opened.steps.tolist() == [2, 4, 6]
    assert_problem(opened, 4, r"checkpoint-4/config\.json")


def test_two_checkpoints_of_one_step_are_its_problem(llama_checkpoints, tmp_path):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-02")
    opened = dy.open_run(run)
    assert opened.steps.tolist() == [2, 4, 6]
    assert_problem(opened, 2, "holds checkpoint-02 and checkpoint-2, both of step 2; remove one")


def test_a_config_that_leads_out_of_the_run_is_refused(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "run/checkpoint-1")
    (tmp_path / "run/checkpoint-1/config.json").rename(tmp_path / "config.json")
    (tmp_path / "run/checkpoint-1/config.json").symlink_to(tmp_path / "config.json")
    assert_refused(tmp_path / "run", "leads to .* files outside of a run are not read")


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """A real Trainer run of four steps; the model as it is after each saved step."""
    directory = tmp_path_factory.mktemp("trainer")
    weights = {}

    class Keep(transformers.TrainerCallback):
        def on_save(self, args, state, control, model=None, **_):
            weights[state.global_step] = two_dimensional(model)

    tokens = [{"input_ids": [i % 40] * 8, "labels": [i % 40] * 8} for i in range(16)]
    trainer = transformers.Trainer(
        model=tiny_llama(),
        args=transformers.TrainingArguments(
            output_dir=str(directory),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
            include_num_input_tokens_seen=True,
        ),
        train_dataset=tokens,
        callbacks=[Keep()],
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return directory, weights


def test_a_trainer_run_is_read_step_by_step(trained):
    directory, weights = trained
    run = dy.open_run(directory)
    assert run.steps.tolist() == [2, 4] == sorted(weights)
    assert dict(run.problems) == {}
    for step in (2, 4):
        for name, (values, _) in weights[step].items():
            found = run.read(name, step, schema.WEIGHT)
            np.testing.assert_array_equal(found.values.astype(np.float64), values)


def test_a_trainer_run_is_measured_whole(trained):
    directory, weights = trained
    analysis = dy.analyze(directory)
    assert analysis["kind"].values.tolist() == ["weight", "update", "displacement"]
    assert (analysis["status"].sel(kind="weight") == schema.Status.MEASURED).all()
    name = "lm_head.weight"
    moved = np.linalg.norm(weights[4][name][0] - weights[2][name][0])
    found = analysis["frobenius_norm"].sel(kind="update", step=4, matrix=name)
    assert moved > 0
    np.testing.assert_allclose(float(found), moved, rtol=1e-12)


def test_what_the_trainer_logged_is_along_the_steps(trained):
    directory, _ = trained
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    loss = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    assert set(loss) == {1, 2, 3, 4}
    analysis = dy.analyze(directory, metrics=["stable_rank"], kinds=["weight"])
    assert analysis["loss"].dims == ("step",)
    assert analysis["loss"].values.tolist() == [loss[2], loss[4]]
    assert analysis["tokens"].values.tolist() == [2 * 2 * 8, 4 * 2 * 8]
    assert analysis["learning_rate"].values[0] > analysis["learning_rate"].values[1] > 0


def test_a_log_line_after_the_checkpoint_is_not_its_own(trained, tmp_path):
    directory, _ = trained
    run = shutil.copytree(directory, tmp_path / "run")
    shutil.copy(run / "trainer_state.json", run / "checkpoint-2")  # knows of step 4
    found, expected = dy.open_run(run).scalars, dy.open_run(directory).scalars
    np.testing.assert_array_equal(found["loss"], expected["loss"])


def test_the_final_model_beside_checkpoints_is_the_step_that_its_state_tells(trained, tmp_path):
    directory, weights = trained
    assert (directory / "model.safetensors").is_file()
    assert dy.open_run(directory).steps.tolist() == [2, 4]  # the one of step 4 is there already
    run = shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-4")
    opened = dy.open_run(run)
    assert opened.steps.tolist() == [2, 4]
    found = opened.read("lm_head.weight", 4, schema.WEIGHT).values
    np.testing.assert_array_equal(found, weights[4]["lm_head.weight"][0])
    (run / "trainer_state.json").unlink()
    assert dy.open_run(run).steps.tolist() == [2]


def test_a_final_model_alone_is_at_its_step(trained, tmp_path):
    directory, _ = trained
    run = shutil.copytree(directory, tmp_path / "run", ignore=shutil.ignore_patterns("check*"))
    assert dy.open_run(run).steps.tolist() == [4]


def test_a_damaged_trainer_state_makes_its_checkpoint_a_problem(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "checkpoint-2/trainer_state.json").write_text('{"log_history": 3}')
    assert_problem(dy.open_run(run), 2, "log_history of int, expected a list")
