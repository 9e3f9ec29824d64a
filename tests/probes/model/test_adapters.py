"""Adapters that are no plain LoRA: PEFT's own merge, bit for bit, without a change of the model."""

import copy

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.probes.model.reading import Mixed, assert_as_merged, by_name, randomised, read_all

LLAMA = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TARGETS = ["first", "second"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(self.second(torch.tanh(self.first(x))))


OPTIONS = {
    "IA3": {"feedforward_modules": ["second"]},
    "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 10},
    "VBLORA": {"num_vectors": 8, "vector_length": 8},
    "LN_TUNING": {"target_modules": ["norm"]},
    "ADALORA": {"total_step": 10},
    "SHIRA": {"r": 2},
    "MISS": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "WAVEFT": {"n_frequency": 10},
    "RANDLORA": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 16},
}
MERGED = [
    pytest.param("ADAMSS", marks=pytest.mark.slow),
    *("ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA"),
    *("GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT"),
    *("PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA"),
    *("VBLORA", "VERA", "WAVEFT"),
]


def _adapted(method, model=None, **options):
    torch.manual_seed(0)
    model = Small() if model is None else model
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    options = {"target_modules": TARGETS} | OPTIONS.get(method, {}) | options
    return randomised(peft.get_peft_model(model, config(**options)))


@pytest.mark.parametrize("method", MERGED)
def test_the_weight_of_every_method_is_what_merging_gives_and_what_the_model_computes_with(method):
    model = _adapted(method).train()
    values = read_all(model)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = Small()
    for name in plain.state_dict():
        assert torch.equal(values[name], merged.get_parameter(name)), name
    plain.load_state_dict({name: values[name] for name in plain.state_dict()})
    x = torch.randn(4, 16)
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain(x), model.unload()(x)), "the adapter does nothing"


@pytest.mark.parametrize("method", ["LILY", "POLY"])
def test_what_depends_on_the_input_is_left_out_by_name(method):
    model = _adapted(method)
    assert set(read_all(model)) == {"norm.weight", "norm.bias"}
    reasons = by_name(model)[1]
    reason = f"weights under {method} adapters that PEFT cannot merge"
    assert reasons["first.weight"] == reasons["second.weight"] == reason
    assert set(reasons.values()) == {reason, f"{method} adapters"}


@pytest.mark.parametrize("method", ["ALoRA", "X-LoRA", "Arrow"])
def test_variants_of_lora_that_depend_on_the_input_are_left_out_by_name(method, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False))
    names = {name for name, _ in model.named_parameters()}
    kinds = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    if method == "ALoRA":
        adapted = peft.get_peft_model(model, peft.LoraConfig(**kinds, alora_invocation_tokens=[1]))
    else:
        for each in ("a", "b"):
            saved = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**kinds))
            saved.save_pretrained(tmp_path / each)
        paths = [str(tmp_path / each) for each in ("a", "b")]
        if method == "Arrow":
            adapted = peft.create_arrow_model(model, paths, peft.ArrowConfig(top_k=1))
        else:
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=16, adapters=dict(zip("ab", paths, strict=True))
            )
            adapted = peft.get_peft_model(model, config)
    read = set(read_all(adapted)) & names
    queries = {name for name in names if "q_proj" in name}
    assert read == names - queries
    reasons = by_name(adapted)[1]
    reason = f"weights under {method} adapters that PEFT cannot merge"
    assert {reasons[name] for name in queries} == {reason}
    assert f"{method} adapters" in reasons.values()


@pytest.mark.parametrize("config", ["kasa_config", "monteclora_config", "velora_config"])
def test_other_variants_of_lora_are_merged(config):
    import peft.tuners.lora.config as configs

    options = {config: getattr(configs, config.title().replace("_", ""))()}
    model = _adapted("LORA", Small().bfloat16(), **options)
    assert_as_merged(model)
    weight = by_name(model)[0]["first.weight"]
    assert (weight.factors() is not None) == (config == "velora_config")  # trained differently


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["linear", "embed", "conv1d", "conv2d", "conv3d"])
def test_dora_is_recorded_without_its_factors(target, dtype):
    """Its W - W_base is no s·B·A: the factors alone would be taken for the whole adapter."""
    model = _adapted("LORA", Mixed().to(dtype), target_modules=[target], use_dora=True)
    assert_as_merged(model)
    weights, reasons = by_name(model)
    weight = weights[f"{target}.weight"]
    assert weight.factors() is None
    assert weight.parameter is None
    assert weight.parts
    assert set(reasons.values()) == {"DoRA adapters, of which only the merged weight is read"}
    assert len(reasons) == 3


def test_dora_beside_plain_lora_leaves_the_plain_layers_as_they_are():
    model = _adapted("LORA", target_modules=["first"])
    config = peft.LoraConfig(target_modules=["second"], use_dora=True)
    model.add_adapter("dora", config)
    model.base_model.set_adapter(["default", "dora"])
    assert_as_merged(randomised(model))
    weights, _ = by_name(model)
    assert weights["first.weight"].factors() is not None
    assert weights["second.weight"].factors() is None


def test_mixed_methods_on_one_layer_are_merged_one_after_another():
    torch.manual_seed(0)
    model = peft.PeftMixedModel(Small(), peft.LoraConfig(target_modules=["first"]))
    model.add_adapter("loha", peft.LoHaConfig(target_modules=["first", "second"]))
    model.set_adapter(["default", "loha"])
    assert_as_merged(randomised(model))


def test_adapters_that_are_disabled_or_merged_already_add_nothing():
    model = _adapted("LOHA")
    weight = by_name(model)[0]["first.weight"]
    base = model.base_model.model.first.base_layer.weight
    added = weight.read().clone()
    with model.disable_adapter():
        assert torch.equal(weight.read(), base)
    assert torch.equal(weight.read(), added)
    model.merge_adapter()
    assert torch.equal(weight.read(), added)
    assert torch.equal(base, added)


def _llama(tie=False, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tie))
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    return randomised(peft.get_peft_model(model, config))


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens", "lm_head"], ["norm", "mlp"]])
def test_modules_to_save_have_the_names_of_the_model_and_its_weights_as_base(modules):
    model = _llama(modules_to_save=modules)
    assert_as_merged(model)
    weights, reasons = by_name(model)
    originals = {
        name.replace("base_model.model.", "").replace("original_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if "original_module" in name
    }
    assert originals
    for name, original in originals.items():
        weight = weights[name]
        assert weight.parameter.requires_grad
        assert torch.equal(weight.base(), original)
        assert not torch.equal(weight.read(), weight.base())
        assert reasons[name] == "originals of modules_to_save"


def test_a_saved_module_is_read_from_the_copy_that_is_active():
    model = _llama(modules_to_save=["lm_head"])
    model.add_adapter(
        "other", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    weight = by_name(model)[0]["lm_head.weight"]
    copies = model.base_model.model.lm_head.modules_to_save
    original = model.base_model.model.lm_head.original_module.weight
    assert torch.equal(weight.read(), copies["default"].weight)
    assert not torch.equal(weight.read(), copies["other"].weight)
    model.set_adapter("other")
    assert torch.equal(weight.read(), copies["other"].weight)
    assert_as_merged(model)
    with model.disable_adapter():
        assert torch.equal(weight.read(), original)
    weights, not_read = by_name(model)
    assert weights["lm_head.weight"].parameter is copies["other"].weight
    assert "lm_head.weight" in not_read


def test_a_saved_module_of_an_adapter_that_is_not_active_is_not_read():
    model = _llama()
    model.add_adapter(
        "other", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    weights, reasons = by_name(model)
    original = model.base_model.model.lm_head.original_module.weight
    assert weights["lm_head.weight"].parameter is original
    assert reasons["lm_head.weight"] == "copies of modules_to_save that are not active"
    assert_as_merged(model)


@pytest.mark.parametrize("tie", [False, True])
def test_trainable_token_rows_replace_those_of_the_embedding(tie):
    model = _llama(tie, trainable_token_indices={"embed_tokens": [3, 7]})
    values = assert_as_merged(model)
    layer = model.base_model.model.model.embed_tokens.token_adapter
    rows = layer.trainable_tokens_delta["default"]
    assert torch.equal(values["model.embed_tokens.weight"][[3, 7]], rows)
    _, reasons = by_name(model)
    name = "model.embed_tokens.trainable_tokens_delta.default"
    assert reasons[name] == "trainable token rows"
    assert ("lm_head.weight" in values) == (not tie)


def test_a_prompt_is_a_weight_and_the_model_is_as_it_was():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    names = {name for name, _ in model.named_parameters()}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    values = read_all(peft.get_peft_model(model, config))
    prompts = {"prompt_encoder.default.embedding.weight"}
    assert set(values) - names == prompts


def test_the_attention_inside_of_an_adaption_prompt_keeps_its_names():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    names = {name for name, _ in model.named_parameters()}
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    values = read_all(peft.get_peft_model(model, config))
    assert names < set(values)
    assert all("adaption" in name for name in set(values) - names)


@pytest.mark.slow
def test_the_names_survive_other_wrappers():
    model = torch.compile(nn.Sequential(_llama(modules_to_save=["lm_head"])))
    names = {name.removeprefix("0.") for name in read_all(model)}
    assert {"model.embed_tokens.weight", "lm_head.weight"} < names
