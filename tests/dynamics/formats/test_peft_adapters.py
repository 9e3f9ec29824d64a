import json
import re
import shutil
import warnings

import numpy as np
import pytest

import dynamics as dy
from dynamics import schema
from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.runs.run import Dense, Factored

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UP1 = "model.layers.1.mlp.up_proj.weight"
TARGETS = ["q_proj", "up_proj"]


def random_factors(model, seed=1):
    """Give every LoRA factor and saved module random values: B = 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.3 * noise)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """saved(config, model): (directory of a run with checkpoint-3 and base/, PEFT model)."""

    def save(*, model=None, base=True, **config):
        model = model if model is not None else tiny_llama()
        if base:
            model.save_pretrained(tmp_path / "run/base")
        settings = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice on the configurations tested here
            model = peft.get_peft_model(model, peft.LoraConfig(**(settings | config)))
            random_factors(model)
            model.save_pretrained(tmp_path / "run/checkpoint-3")
        return tmp_path / "run", model

    return save


def lora_layers(model):
    """Clean parameter name -> PEFT's own LoRA layer."""
    return {
        name.removeprefix("base_model.model.") + ".weight": module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def merged_weights(model):
    """Name -> weight after PEFT's own merge, computed in float64."""
    merged = model.double().merge_and_unload()
    return {name: each.detach().numpy() for name, each in merged.named_parameters()}


def check_against_peft(directory, model):
    """Adapter, base and weight of every matrix equal what PEFT computes."""
    run = dy.open_run(directory, split_fused=False)
    assert run.format == "peft"
    layers = lora_layers(model)
    assert layers
    bases = {
        name: layer.get_base_layer().weight.detach().double().numpy().copy()
        for name, layer in layers.items()
    }
    factors = {}
    for name, layer in layers.items():
        a = layer.lora_A["default"].weight if layer.lora_A else layer.lora_embedding_A["default"]
        b = layer.lora_B["default"].weight if layer.lora_B else layer.lora_embedding_B["default"]
        scaled = layer.scaling["default"]
        factors[name] = (a.detach().double().numpy(), b.detach().double().numpy(), scaled)
        adapter = run.read(name, 3, schema.ADAPTER)
        assert isinstance(adapter, Factored)
        assert adapter.scale == pytest.approx(scaled, rel=1e-15)
        assert adapter.rank_bound == a.shape[0]
    merged = merged_weights(model)
    for name, weight in merged.items():
        if weight.ndim != 2 or name not in run.matrices:
            continue
        found = run.read(name, 3, schema.WEIGHT)
        assert found.shape == weight.shape == (run.matrices[name].rows, run.matrices[name].cols)
        np.testing.assert_allclose(found.values, weight, rtol=1e-12, atol=1e-14)
    for name, (a, b, scaled) in factors.items():
        product = scaled * b @ a
        expected = product if product.shape == bases[name].shape else product.T
        if not np.allclose(merged[name] - bases[name], expected, atol=1e-12):
            expected = product.T  # a square Conv1D
        found = run.read(name, 3, schema.ADAPTER).product()
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(merged[name] - bases[name], found, atol=1e-12)
        np.testing.assert_array_equal(run.read(name, 3, schema.BASE).values, bases[name])
    return run


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 5}},
        {"alpha_pattern": {"q_proj": 31}},
        {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 2}},
        {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"^model.layers.0": 1}},
        {"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"up_proj": 9}, "use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_weight_adapter_and_base_are_those_of_peft(saved, config):
    directory, model = saved(**config)
    check_against_peft(directory, model)


def test_biases_do_not_disturb(saved, tiny_llama):
    directory, model = saved(
        model=tiny_llama(attention_bias=True),
        target_modules=["q_proj"],
        bias="lora_only",
        lora_bias=True,
    )
    check_against_peft(directory, model)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj"], ["c_attn", "c_proj", "c_fc"]])
def test_conv1d_of_gpt2_is_read_in_its_stored_orientation(saved, targets):
    directory, model = saved(model=gpt2(), target_modules=targets, fan_in_fan_out=True)
    run = check_against_peft(directory, model)
    info = run.matrices["transformer.h.0.attn.c_attn.weight"]
    assert (info.rows, info.cols) == (16, 48)


def test_fan_in_fan_out_that_peft_sets_by_itself_is_found(saved):
    directory, model = saved(model=gpt2(), target_modules=["c_attn"], fan_in_fan_out=False)
    check_against_peft(directory, model)


def test_an_adapter_in_bfloat16_says_so(saved, tiny_llama):
    directory, model = saved(model=tiny_llama().to(torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(directory / "checkpoint-3")
    run = check_against_peft(directory, model)
    assert run.read(Q_PROJ, 3, schema.ADAPTER).dtype == "bfloat16"
    assert run.read(Q_PROJ, 3, schema.BASE).dtype == "bfloat16"


def test_a_module_that_was_trained_in_full_is_the_trained_one(saved):
    directory, model = saved(modules_to_save=["lm_head"])
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight.detach().numpy()
    original = model.base_model.model.lm_head.original_module.weight.detach().numpy()
    run = dy.open_run(directory)
    assert not np.array_equal(trained, original)
    for kind in (schema.WEIGHT, schema.BASE):
        np.testing.assert_array_equal(run.read("lm_head.weight", 3, kind).values, trained)
    assert run.read("lm_head.weight", 3, schema.ADAPTER) is None


def test_a_matrix_without_adapter_has_its_base_as_weight(saved):
    directory, _ = saved()
    run = dy.open_run(directory)
    name = "model.layers.0.self_attn.v_proj.weight"
    weight, base = run.read(name, 3, schema.WEIGHT), run.read(name, 3, schema.BASE)
    assert isinstance(weight, Dense)
    np.testing.assert_array_equal(weight.values, base.values)
    assert run.read(name, 3, schema.ADAPTER) is None


def test_the_spectrum_of_an_adapter_is_that_of_the_product(saved):
    directory, model = saved()
    analysis = dy.analyze(directory, kinds=["adapter"])
    for name in (Q_PROJ, UP1):
        layer = lora_layers(model)[name]
        a, b = (
            each["default"].weight.detach().double().numpy()
            for each in (layer.lora_A, layer.lora_B)
        )
        expected = np.linalg.svd(layer.scaling["default"] * b @ a, compute_uv=False)
        found = analysis["singular_value"].sel(kind="adapter", step=3, matrix=name).dropna("index")
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-12 * expected[0])
        assert float(analysis["effective_rank"].sel(kind="adapter", matrix=name).squeeze()) <= 3
        assert float(analysis["rank_bound"].sel(kind="adapter", matrix=name).squeeze()) == 3


def test_matrices_without_an_adapter_are_not_recorded_in_that_kind(saved):
    directory, _ = saved()
    analysis = dy.analyze(directory)
    assert analysis["kind"].values.tolist() == [
        "weight", "base", "adapter", "update", "displacement", "cycle_update"
    ]  # fmt: skip
    status = analysis["status"].sel(kind="adapter", step=3)
    assert status.sel(matrix=Q_PROJ) == schema.Status.MEASURED
    assert status.sel(matrix="lm_head.weight") == schema.Status.NOT_RECORDED


def test_several_checkpoints_share_the_base_beside_them(saved):
    directory, model = saved()
    random_factors(model, seed=2)
    model.save_pretrained(directory / "checkpoint-9")
    analysis = dy.analyze(directory, kinds=["update", "adapter", "base"])
    first, second = (
        dy.open_run(directory).read(Q_PROJ, step, "adapter").product() for step in (3, 9)
    )
    found = analysis["frobenius_norm"].sel(kind="update", step=9, matrix=Q_PROJ)
    np.testing.assert_allclose(float(found), np.linalg.norm(second - first), rtol=1e-10)


def test_each_checkpoint_may_have_its_own_base(saved, tiny_llama):
    directory, model = saved()
    model.save_pretrained(directory / "checkpoint-9")
    other = tiny_llama(seed=5)
    other.save_pretrained(directory / "checkpoint-9/base")
    run = dy.open_run(directory)
    expected = other.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(run.read(Q_PROJ, 9, "base").values, expected)
    assert not np.array_equal(run.read(Q_PROJ, 3, "base").values, expected)


def test_a_single_adapter_directory_is_one_checkpoint(saved):
    directory, model = saved(base=False)
    tiny = directory / "alone"
    shutil.copytree(directory / "checkpoint-3", tiny)
    model.unload().save_pretrained(tiny / "base")
    run = dy.open_run(tiny)
    assert run.steps.tolist() == [0]
    assert run.kinds == ("weight", "base", "adapter", "update", "displacement", "cycle_update")


def test_the_base_is_found_where_the_adapters_config_says(saved, tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "original")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "original")
    directory, model = saved(model=model, base=False)
    check_against_peft(directory, model)


# What cannot be served --------------------------------------------------------------------------


@pytest.fixture
def without_base(saved):
    directory, model = saved(base=False)
    config = directory / "checkpoint-3/adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"base_model_name_or_path": "meta-llama/somewhere"}))
    return directory, model


def test_a_missing_base_is_an_error_that_says_where_it_looked_and_how_to_go_on(without_base):
    directory, _ = without_base
    with pytest.raises(MissingError) as caught:
        dy.analyze(directory)
    message = str(caught.value)
    assert str(directory / "base") in message
    assert str(directory / "checkpoint-3/base") in message
    assert "'meta-llama/somewhere' is neither a local directory" in message
    assert "base=" in message
    assert "kinds=['adapter']" in message
    assert "\n" not in message
    for kind in ("weight", "base"):
        with pytest.raises(MissingError, match="holds an adapter only"):
            dy.analyze(directory, kinds=[kind])


def test_the_adapter_alone_is_measured_without_a_base(without_base):
    directory, _ = without_base
    analysis = dy.analyze(directory, kinds=["adapter"])
    assert set(analysis["module"].values.tolist()) == {"q_proj", "up_proj"}
    assert (analysis["status"] == schema.Status.MEASURED).all()


def test_a_base_that_is_given_is_used(without_base, tiny_llama, tmp_path):
    directory, model = without_base
    tiny_llama().save_pretrained(tmp_path / "given")
    run = dy.open_run(directory, base=tmp_path / "given")
    np.testing.assert_allclose(
        run.read(Q_PROJ, 3, "weight").values, merged_weights(model)[Q_PROJ], rtol=1e-12, atol=1e-14
    )


def test_a_base_that_is_none_is_named(without_base, tmp_path):
    directory, _ = without_base
    for base in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FormatError, match=f"The base model {base} holds no model.safetensors"):
            dy.open_run(directory, base=base)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("family", r"other has no model\.layers.* and 3 others.*not the base of this adapter"),
        ("size", r"other has .*weight in shape \(\d+, 32\).*fits \(\d+, 16\)"),
        ("damage", r"other/model\.safetensors"),
    ],
)
def test_a_base_that_does_not_fit_never_hides_the_adapter(
    without_base, tiny_llama, tmp_path, other, reason
):
    directory, model = without_base
    base = gpt2() if other == "family" else tiny_llama(hidden_size=32)
    base.save_pretrained(tmp_path / "other")
    if other == "damage":
        (tmp_path / "other/model.safetensors").write_bytes(b"damaged")
    run = dy.open_run(directory, base=tmp_path / "other")
    assert run.kinds == ("adapter",)
    assert set(run.absent_kinds) == {"weight", "base"}
    for told in run.absent_kinds.values():
        assert re.search(reason, told)
        assert "kinds=['adapter']" in told
    layer = lora_layers(model)[Q_PROJ]
    expected = layer.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(run.read(Q_PROJ, 3, "adapter").product(), expected, atol=1e-6)
    with pytest.raises(MissingError, match=reason):
        dy.analyze(run)


def test_a_damaged_base_of_one_step_is_a_problem_of_that_step(saved, tiny_llama):
    directory, model = saved()
    model.save_pretrained(directory / "checkpoint-9")
    (directory / "checkpoint-9/base").mkdir()
    (directory / "checkpoint-9/base/model.safetensors").write_bytes(b"damaged")
    run = dy.open_run(directory)
    assert run.absent_kinds == {}
    assert run.read(Q_PROJ, 3, "weight") is not None
    assert run.read(Q_PROJ, 9, "adapter") is not None
    for kind in ("weight", "base"):
        with pytest.raises(FormatError, match="checkpoint-9/base"):
            run.read(Q_PROJ, 9, kind)


def test_one_layer_of_another_shape_is_left_out_by_name(saved, tiny_llama):
    directory, _ = saved(target_modules=["q_proj", "up_proj", "lm_head"])
    tiny_llama(vocab_size=44).save_pretrained(directory / "base")
    checkpoint = directory / "checkpoint-3/adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    # PEFT saved the head's own weight beside its adapter; older versions do not.
    save_file({n: t for n, t in load_file(checkpoint).items() if "lora_" in n}, checkpoint)
    run = dy.open_run(directory)
    (left_out,) = [each for each in run.account.left_out if not each.is_vector]
    assert left_out.name == "lm_head.weight"
    assert "do not fit the shape" in left_out.reason
    assert run.read("lm_head.weight", 3, "adapter") is not None
    assert run.read("lm_head.weight", 3, "weight") is None
    assert run.read(Q_PROJ, 3, "weight") is not None


def test_a_base_is_refused_for_other_formats(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(DynamicsError, match="'checkpoints', which takes no base model"):
        dy.open_run(tmp_path, base=tmp_path)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", False])
def test_an_initialisation_that_leaves_the_base_alone_is_read(saved, init):
    directory, model = saved(init_lora_weights=init, r=4)
    check_against_peft(directory, model)


def test_a_config_without_its_weights_is_named(saved):
    directory, _ = saved()
    (directory / "checkpoint-3/adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"checkpoint-3 has adapter_config\.json but no"):
        dy.open_run(directory)


@pytest.mark.parametrize("damage", ["one factor", "ranks", "one dimension"])
def test_a_damaged_layer_is_left_out_by_name_and_the_others_are_measured(saved, damage):
    from safetensors.numpy import load_file, save_file

    directory, model = saved()
    file = directory / "checkpoint-3/adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_A.weight"
    if damage == "one factor":
        del tensors[name]
    else:
        part = tensors[name][:2] if damage == "ranks" else tensors[name][0]
        tensors[name] = np.ascontiguousarray(part)
    save_file(tensors, file)
    run = dy.open_run(directory)
    (left_out,) = [each for each in run.account.left_out if not each.is_vector]
    assert left_out.name == Q_PROJ
    assert "LoRA layers" in left_out.reason
    assert Q_PROJ not in run.matrices
    expected = merged_weights(model)[UP1]
    np.testing.assert_allclose(run.read(UP1, 3, "weight").values, expected, rtol=1e-12, atol=1e-14)


def test_a_layer_that_is_damaged_at_one_step_is_unreadable_there(saved):
    from safetensors.numpy import load_file, save_file

    directory, model = saved()
    model.save_pretrained(directory / "checkpoint-9")
    file = directory / "checkpoint-9/adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_A.weight"]
    save_file(tensors, file)
    run = dy.open_run(directory)
    assert run.read(Q_PROJ, 3, "weight") is not None
    for kind in ("weight", "base", "adapter"):
        with pytest.raises(FormatError, match=f"{Q_PROJ} at step 9: LoRA layers with one factor"):
            run.read(Q_PROJ, 9, kind)
    assert run.read(UP1, 9, "weight") is not None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"peft_type": "LORA"}'])
def test_a_damaged_config_is_named(saved, content):
    directory, _ = saved()
    (directory / "checkpoint-3/adapter_config.json").write_text(content)
    with pytest.raises(FormatError, match="checkpoint-3"):
        dy.open_run(directory)


def test_a_damaged_adapter_among_good_ones_is_named_and_the_rest_measured(saved):
    directory, model = saved()
    model.save_pretrained(directory / "checkpoint-9")
    file = directory / "checkpoint-9/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.warns(dy.UnmeasuredWarning, match="checkpoint-9"):
        analysis = dy.analyze(directory, kinds=["adapter"])
    status = analysis["status"].sel(kind="adapter", matrix=Q_PROJ)
    assert status.values.tolist() == [schema.Status.MEASURED, schema.Status.UNREADABLE]


def test_a_checkpoint_without_adapter_among_others_is_named(saved, tiny_llama):
    directory, _ = saved()
    (directory / "checkpoint-9").mkdir()
    run = dy.open_run(directory)
    assert list(run.problems) == [9]
    assert "has no adapter_config.json" in run.problems[9]
