"""Names of files where the live model has others."""

import peft
import pytest
import torch
import transformers

from probes.model.parameters import track
from probes.model.saved_names import saved_names

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_local_experts": 2}  # fmt: skip
LIVE, SAVED = "model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2)
    )


def held(model, name):
    module = torch.nn.Module()
    setattr(module, name, model)
    return module


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda model: model, ""),
        (torch.compile, ""),
        (lambda model: held(model, "model"), ""),  # as a LightningModule holds it
        (lambda model: held(model, "student"), "student."),
        (lambda m: peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=["q_proj"])), ""),
    ],
    ids=["plain", "compiled", "lightning", "held", "peft"],
)
def test_renamed_parameters_have_the_names_of_the_files_in_every_wrapper(wrap, prefix):
    names = {each.name for each in track(wrap(mixtral()))[0]}
    assert prefix + SAVED in names
    assert prefix + LIVE not in names
    assert f"{prefix}model.layers.0.self_attn.q_proj.weight" in names


def test_both_names_select(tmp_path):
    for pattern in ("*.mlp.gate", "*.block_sparse_moe.gate", LIVE, SAVED):
        (router,), account = track(mixtral(), pattern)
        assert router.name == SAVED
        assert account.unchosen_share() == 0
    (experts,), account = track(mixtral(), "*.experts.1.w2")
    assert [part.name for part in experts.parts] == [
        "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    ]
    (other,) = [each for each in account.left_out if ".experts.0.w2." in each.name]
    assert other.chosen


def test_models_that_rename_nothing_and_other_modules():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if k != "num_local_experts"})
    )
    shapes = {name: tuple(each.shape) for name, each in llama.named_parameters()}
    assert saved_names(llama, shapes) == {}
    assert saved_names(torch.nn.Linear(2, 2), {"weight": (2, 2)}) == {}
