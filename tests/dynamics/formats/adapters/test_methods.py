"""Every method of PEFT: the weight that its own merge makes, or a refusal that names it."""

import os
import pickle
import re

import numpy as np
import pytest

import dynamics as dy
from dynamics.runs.run import Factored

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.dynamics.formats.adapters.merging import (  # noqa: E402
    change_config,
    check_weights,
    deviation,
    merged_weights,
    saved_run,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
TARGETS = ["q_proj", "down_proj"]  # a square matrix, and one that is not


def lora(**settings):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": TARGETS, **settings})


def llama_methods():
    both = {"target_modules": TARGETS}
    yield "dora", lora(use_dora=True)
    yield "dora-embedding", lora(use_dora=True, target_modules=["embed_tokens", "q_proj"])
    yield "dora-rslora", lora(use_dora=True, use_rslora=True)
    yield "pissa", lora(init_lora_weights="pissa")
    yield (
        "pissa-rslora",
        lora(init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2}),
    )
    yield "olora", lora(init_lora_weights="olora")
    yield "loha", peft.LoHaConfig(r=2, alpha=5, rank_pattern={"q_proj": 3}, **both)
    yield "lokr", peft.LoKrConfig(r=2, alpha=5, **both)
    yield (
        "lokr-both",
        peft.LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=4, **both),
    )
    yield "vera", peft.VeraConfig(r=4, **both)
    yield "c3a", peft.C3AConfig(block_size=4, **both)
    yield "oft", peft.OFTConfig(oft_block_size=4, **both)
    yield "oft-exact", peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, **both)
    yield "oft-few-terms", peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, **both)
    yield "oft-shared", peft.OFTConfig(oft_block_size=4, block_share=True, **both)
    yield "oft-coft", peft.OFTConfig(oft_block_size=4, coft=True, eps=0.5, **both)
    yield "boft", peft.BOFTConfig(boft_block_size=4, **both)
    yield "hra", peft.HRAConfig(r=4, **both)
    yield "hra-gs", peft.HRAConfig(r=4, apply_GS=True, **both)
    yield "ia3", peft.IA3Config(feedforward_modules=["down_proj"], **both)
    yield "tokens", lora(trainable_token_indices=[5, 1, 30])
    yield "tokens-by-name", lora(trainable_token_indices={"embed_tokens": [2, 7]})
    yield (
        "tokens-alone",
        peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    )
    yield "saved-modules", lora(use_dora=True, modules_to_save=["lm_head", "v_proj"])
    yield "biases", lora(lora_bias=True, bias="lora_only", target_modules=["q_proj"])


@pytest.mark.parametrize(("name", "config"), list(llama_methods()), ids=lambda each: str(each)[:16])
def test_the_weight_is_that_of_merge_and_unload(tiny_llama, tmp_path, name, config):
    model = saved_run(tmp_path, tiny_llama(attention_bias=name == "biases"), config)
    before = dict(model.get_base_model().state_dict())
    expected = merged_weights(model)
    run, _ = check_weights(tmp_path, expected)
    assert set(run.kinds) >= {"weight"}
    original = {n.replace(".base_layer.", "."): each for n, each in before.items()}
    changed = [
        n for n in run.matrices if not np.array_equal(expected[n], original.get(n, expected[n]))
    ]
    assert changed or name.startswith(("tokens", "saved")), "the adapter does nothing"


def test_what_is_computed_has_base_and_no_adapter(tiny_llama, tmp_path):
    base = tiny_llama().state_dict()
    saved_run(tmp_path, tiny_llama(), lora(use_dora=True))
    for file in tmp_path.rglob("*.*"):  # long enough ago for their time to tell a change
        os.utime(file, (1e9, 1e9))
    run = dy.open_run(tmp_path)
    assert run.stored_kinds == ("weight", "base")
    np.testing.assert_array_equal(run.read(Q_PROJ, 3, "base").values, base[Q_PROJ])
    assert run.read(Q_PROJ, 3, "adapter") is None
    weight = run.read(Q_PROJ, 3, "weight")
    assert deviation(weight.values, base[Q_PROJ].numpy()) > 1e-2
    assert run.origin(Q_PROJ, 3, "weight") != run.origin(Q_PROJ, 3, "base")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_of_a_residual_initialisation_is_what_training_began_with(
    tiny_llama, tmp_path, init
):
    model = saved_run(tmp_path, tiny_llama(), lora(init_lora_weights=init))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    run = dy.open_run(tmp_path)
    base = run.read(Q_PROJ, 3, "base").values
    left = layer.base_layer.weight.detach().numpy()
    original = tiny_llama().state_dict()[Q_PROJ].numpy()
    # PEFT decomposes in float32, with an error of a few roundings of the largest singular value.
    assert np.abs(base - left).max() < 1e-6 * np.linalg.norm(original, 2)
    assert np.abs(base - original).max() > 0.1 * np.abs(original).max()
    adapter = run.read(Q_PROJ, 3, "adapter")
    assert isinstance(adapter, Factored)
    assert adapter.rank_bound == 3


def test_a_base_in_bfloat16_leaves_a_residual_in_bfloat16(tiny_llama, tmp_path):
    model = saved_run(tmp_path, tiny_llama().bfloat16(), lora(init_lora_weights="pissa"))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    run = dy.open_run(tmp_path)
    expected = layer.base_layer.weight.detach().float().numpy()
    found = run.read(DOWN, 3, "base").values
    assert np.mean(found == expected) > 0.99  # the same up to ties of rounding
    assert deviation(found, expected) < 2**-8


def test_a_run_of_computed_weights_is_measured_by_worker_processes(tiny_llama, tmp_path):
    saved_run(tmp_path, tiny_llama(), lora(use_dora=True))
    run = pickle.loads(pickle.dumps(dy.open_run(tmp_path)))
    assert run.read(Q_PROJ, 3, "weight") is not None


def refused_methods():
    both = {"target_modules": TARGETS}
    yield "ADALORA|AdaLoRA", peft.AdaLoraConfig(total_step=10, **both)
    yield "FOURIERFT", peft.FourierFTConfig(n_frequency=5, **both)
    yield "MISS", peft.MissConfig(r=2, **both)
    yield "SHIRA", peft.ShiraConfig(r=2, **both)
    yield "ROAD", peft.RoadConfig(group_size=4, **both)
    yield "RANDLORA", peft.RandLoraConfig(r=2, **both)
    yield "DELORA", peft.DeloraConfig(r=2, **both)
    yield "VBLORA", peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **both)
    yield "save_projection=False", peft.VeraConfig(r=4, save_projection=False, **both)
    yield "pissa_niter_4", lora(init_lora_weights="pissa_niter_4")


@pytest.mark.parametrize(
    ("reason", "config"), list(refused_methods()), ids=lambda each: str(each)[:20]
)
def test_what_cannot_be_computed_is_left_out_by_name_and_the_rest_is_measured(
    tiny_llama, tmp_path, reason, config
):
    saved_run(tmp_path, tiny_llama(), config)
    run = dy.open_run(tmp_path)
    left_out = {each.name: each.reason for each in run.account.left_out if not each.is_vector}
    for name in (Q_PROJ, DOWN):
        assert re.search(reason, left_out[name])
        assert name not in run.matrices or run.read(name, 3, "weight") is None
    merged = tiny_llama().state_dict()
    untouched = "model.layers.0.self_attn.v_proj.weight"
    np.testing.assert_array_equal(run.read(untouched, 3, "weight").values, merged[untouched])
    assert set(run.matrices) <= set(merged)  # no part of an adapter is a matrix of its own


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_an_adapter_whose_base_changed_in_an_unknown_way_is_measured_alone(
    tiny_llama, tmp_path, init
):
    saved_run(tmp_path, tiny_llama(), lora())
    change_config(tmp_path, init_lora_weights=init)
    run = dy.open_run(tmp_path)
    assert isinstance(run.read(Q_PROJ, 3, "adapter"), Factored)
    assert run.read(Q_PROJ, 3, "weight") is None
    assert run.read(Q_PROJ, 3, "base") is None
    assert init in {each.name: each.reason for each in run.account.left_out}[Q_PROJ]


@pytest.mark.parametrize(
    ("field", "name"),
    [("kasa_config", "KaSA"), ("arrow_config", "Arrow"), ("use_qalora", "QA-LoRA")],
)
def test_a_variant_of_lora_is_left_out_by_name(tiny_llama, tmp_path, field, name):
    saved_run(tmp_path, tiny_llama(), lora())
    change_config(tmp_path, **{field: {"k": 1}})
    run = dy.open_run(tmp_path)
    assert run.stored_kinds == ("weight",)
    assert {each.reason for each in run.account.left_out if each.name == Q_PROJ} == {
        f"{name} adapters, whose weight is more than s·B·A"
    }
    assert Q_PROJ not in run.matrices


def test_butterflies_of_several_factors_are_left_out_by_name(tiny_llama, tmp_path):
    saved_run(tmp_path, tiny_llama(), peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS))
    file = tmp_path / "checkpoint-3/adapter_model.safetensors"
    tensors = {
        name: each.repeat(2, 1, 1, 1) if "boft_R" in name else each
        for name, each in load_file(file).items()
    }
    save_file(tensors, file)
    run = dy.open_run(tmp_path)
    reasons = {each.reason for each in run.account.left_out if not each.is_vector}
    assert reasons == {"BOFT adapters of several butterfly factors"}


def test_prompts_are_no_matrices_and_leave_the_model_as_it_is(tiny_llama, tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    saved_run(tmp_path, tiny_llama(), config)
    run = dy.open_run(tmp_path)
    assert "prompt_embeddings" not in run.matrices
    assert any("PROMPT_TUNING" in each.reason for each in run.account.left_out)
    np.testing.assert_array_equal(
        run.read(Q_PROJ, 3, "weight").values, tiny_llama().state_dict()[Q_PROJ]
    )


def test_without_a_base_a_method_that_needs_it_is_refused_by_name(tiny_llama, tmp_path):
    saved_run(tmp_path, tiny_llama(), lora(use_dora=True), base=False)
    with pytest.raises(dy.DynamicsError, match="DoRA adapters without their base weights"):
        dy.open_run(tmp_path)
