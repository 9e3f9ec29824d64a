"""LoRA in each kind of layer: weights have the bits that PEFT merges, and the factors make them."""

import contextlib

import peft
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssModel,
    GraniteMoeConfig,
    GraniteMoeModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralModel,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)

import dynamics as dy
from probes import Recorder
from tests.probes.model.reading import (
    Mixed,
    assert_as_merged,
    by_name,
    randomised,
    read_all,
    untouched,
)

SMALL = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS = ["embed", "linear", "conv1d", "conv2d", "conv1x1", "conv3d"]


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


def _lora(model, mixed_dtypes=False, **options):
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **options})
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=mixed_dtypes)
    return randomised(adapted)


def _llama(**options):
    return _lora(LlamaForCausalLM(LlamaConfig(**SMALL)), **options)


def _moe(model_class, config_class, targets, **options):
    options = {**SMALL, "head_dim": 8, **options}
    return _lora(model_class(config_class(**options)), target_modules=["q_proj"], **targets)


def _experts(*names):
    return {"target_parameters": [f"experts.{name}" for name in names]}


BOTH = _experts("gate_up_proj", "down_proj")
QWEN = {"moe_intermediate_size": 12, "num_experts": 3, "decoder_sparse_step": 1}
GRANITE = {"target_parameters": ["input_linear.weight", "output_linear.weight"]}
OSS = {"num_local_experts": 3, "layer_types": ["full_attention"] * 2}

CASES = {
    "layers": lambda: _lora(Mixed(), target_modules=LAYERS),
    "layers_bfloat16": lambda: _lora(Mixed().bfloat16(), target_modules=LAYERS),
    "layers_float32_in_bfloat16": lambda: _lora(Mixed().bfloat16(), True, target_modules=LAYERS),
    "layers_float16": lambda: _lora(Mixed().half(), True, target_modules=LAYERS),
    "rslora": lambda: _lora(Mixed(), target_modules=LAYERS, use_rslora=True),
    "biases": lambda: _lora(Mixed(), target_modules=["linear", "conv2d"], lora_bias=True),
    "patterns": lambda: _llama(
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 5},
        alpha_pattern={"up_proj": 3},
    ),
    "one_layer": lambda: _llama(target_modules=["q_proj"], layers_to_transform=[1]),
    "fan_in_fan_out": lambda: _lora(
        GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2)),
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    ),
    "mica": lambda: _lora(
        Mixed().bfloat16(), True, target_modules=["linear"], init_lora_weights="mica"
    ),
    "pissa": lambda: _llama(target_modules=["q_proj"], init_lora_weights="pissa"),
    "attention": lambda: _lora(Attends(), target_modules=["attn", "head"]),
    "attention_bfloat16": lambda: _lora(Attends().bfloat16(), True, target_modules=["attn"]),
    "mixtral": lambda: _moe(MixtralModel, MixtralConfig, BOTH, num_local_experts=3),
    "mixtral_one": lambda: _moe(MixtralModel, MixtralConfig, _experts("down_proj")),
    "qwen3_moe": lambda: _moe(Qwen3MoeModel, Qwen3MoeConfig, BOTH, **QWEN),
    "granite": lambda: _moe(GraniteMoeModel, GraniteMoeConfig, GRANITE, num_local_experts=3),
    "gpt_oss": lambda: _moe(GptOssModel, GptOssConfig, BOTH, **OSS),
    "two_dimensional_parameter": lambda: _lora(
        Mixed(), target_modules=[], target_parameters=["linear.weight"]
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_weight_has_the_bits_that_merging_gives_it(case):
    assert_as_merged(CASES[case]())


@pytest.mark.parametrize("case", CASES)
def test_the_factors_make_what_the_adapter_adds(case):
    weights, reasons = by_name(CASES[case]())
    found = {name: each for name, each in weights.items() if each.factors() is not None}
    assert found
    for name, weight in found.items():
        a, b, scaling, transposed = weight.factors()
        product = scaling * (b.double() @ a.double())
        product = (product.mT if transposed else product).reshape(weight.shape)
        change = weight.read().double() - weight.base().double()
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(product, change, rtol=0, atol=4 * eps, msg=name)
        assert change.norm() > 0
    factors = {name for name, reason in reasons.items() if reason == "adapter factors"}
    assert len(factors) == 2 * len(found)


def _grouped():
    torch.manual_seed(0)
    return _lora(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), target_modules=["0"])


def test_a_grouped_convolution_that_peft_cannot_merge_is_left_out_by_name():
    model = _grouped()
    assert set(read_all(model)) == {"0.bias"}
    _, reasons = by_name(model)
    assert reasons == {
        "0.weight": "weights under LoRA adapters that PEFT cannot merge",
        "0.lora_A.default.weight": "factors of grouped convolutions",
        "0.lora_B.default.weight": "factors of grouped convolutions",
    }


def test_peft_adds_the_factors_of_out_proj_twice_so_they_are_left_out():
    model = CASES["attention"]()
    weights, reasons = by_name(model)
    assert weights["attn.in_proj_weight"].factors() is not None
    assert weights["attn.out_proj.weight"].factors() is None
    twice = {name for name, reason in reasons.items() if "twice" in reason}
    assert twice == {f"attn.out_proj.lora_{factor}.default.weight" for factor in "AB"}
    out = model.base_model.model.attn.base_layer.out_proj
    change = weights["attn.out_proj.weight"].read() - weights["attn.out_proj.weight"].base()
    torch.testing.assert_close(change, 2 * out.get_delta_weight("default"))


def test_an_attention_layer_is_read_right_after_it_trained():
    """PEFT replaces its base weights in each forward pass, and they drift by roundings."""
    model = CASES["attention"]()
    weights, _ = by_name(model)
    for _ in range(3):
        model(torch.randn(2, 3, 16)).sum().backward()
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        if name != "head.bias":
            assert torch.equal(weights[name].read(), parameter), name


def test_experts_are_read_right_after_they_trained():
    """PEFT replaces their parameters by parametrisations in each forward pass."""
    model = CASES["mixtral"]()
    weights, _ = by_name(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.arange(8)[None])[0].square().mean().backward()
        optimizer.step()
    values = {name: each.read().clone() for name, each in weights.items()}
    for name, parameter in model.merge_and_unload().named_parameters():
        assert torch.equal(values[name], parameter), name


def test_experts_have_factors_of_each_expert():
    weights, _ = by_name(CASES["gpt_oss"]())
    weight = weights["layers.0.mlp.experts.gate_up_proj"]
    assert weight.shape == (3, 16, 24)
    assert weight.parameter is None
    a, b, _, transposed = weight.factors()
    assert (tuple(a.shape), tuple(b.shape), transposed) == ((3, 2, 16), (3, 24, 2), True)


def test_disabled_and_merged_adapters_add_nothing_more():
    model = _lora(Mixed(), target_modules=LAYERS)
    weights, _ = by_name(model)
    adapted = {name: each for name, each in weights.items() if each.factors() is not None}
    added = {name: each.read().clone() for name, each in adapted.items()}
    with model.disable_adapter():
        for weight in adapted.values():
            assert torch.equal(weight.read(), weight.parameter)
            assert weight.factors() is None
    model.merge_adapter()
    for name, weight in adapted.items():
        assert torch.equal(weight.read(), added[name])
        assert weight.factors() is None
    merged_and_disabled = {}
    with model.disable_adapter():  # a forward pass would take the adapters out again
        for name, weight in adapted.items():
            merged_and_disabled[name] = weight.read().clone()
    model.unmerge_adapter()
    for name, weight in adapted.items():
        assert torch.equal(merged_and_disabled[name], weight.parameter), name


def test_one_of_several_adapters_is_recorded_and_the_others_are_named():
    model = _lora(Mixed(), target_modules=["linear"])
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["linear", "embed"]))
    model.base_model.set_adapter("other")
    randomised(model)
    assert_as_merged(model)
    weights, reasons = by_name(model)
    assert weights["linear.weight"].factors().a.shape == (3, 8)
    assert reasons["linear.lora_A.other.weight"] == "adapter factors"
    assert reasons["linear.lora_A.default.weight"] == "adapters that are not active"
    model.base_model.set_adapter("default")
    assert weights["linear.weight"].factors().a.shape == (2, 8)
    assert weights["embed.weight"].factors() is None


def test_the_weight_of_several_active_adapters_is_recorded_and_their_factors_are_named():
    model = _lora(Mixed().bfloat16(), True, target_modules=["linear"])
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "other"])
    randomised(model)
    assert_as_merged(model)
    weights, reasons = by_name(model)
    assert weights["linear.weight"].factors() is None
    assert set(reasons.values()) == {"factors of several active adapters"}


@pytest.mark.parametrize("adapted", ["embed", "head"])
def test_tied_weights_of_which_one_is_adapted_are_two_weights(adapted):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

    model = _lora(Tied(), target_modules=[adapted])
    values = read_all(model, tied=True)
    other = {"embed": "head", "head": "embed"}[adapted]
    layer = model.base_model.model.get_submodule(adapted)
    base = layer.base_layer.weight
    assert torch.equal(values[f"{other}.weight"], base)
    assert torch.equal(values[f"{adapted}.weight"], base + layer.get_delta_weight("default"))
    weights, _ = by_name(model)
    assert [each.parameter is not None for each in weights.values()] == [True, False]


def test_tied_weights_without_adapters_have_the_first_name():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    assert set(read_all(model)) == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in read_all(model)


def test_reading_leaves_a_training_model_alone():
    model = CASES["layers"]().train()
    with untouched(model):
        for weight in by_name(model)[0].values():
            weight.read()
            weight.base()
            weight.factors()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "attention", "layers_bfloat16"])
def test_a_recorded_training_is_the_same_and_leaves_the_parameters_as_they_were(case, tmp_path):
    inputs = {"mixtral": torch.arange(8)[None], "attention": torch.ones(2, 3, 16)}

    def trained(store=None):
        torch.manual_seed(0)
        model = CASES[case]()
        before = _flags(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with Recorder(model, optimizer, store, every=1) if store else contextlib.nullcontext():
            for _ in range(2):
                _loss(model, inputs.get(case)).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert _flags(model) == before
        return model

    model, other = trained(tmp_path / "run.zarr"), trained()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    run = dy.open_run(tmp_path / "run.zarr")
    recorded = 0
    for name, weight in by_name(model)[0].items():
        if name in run.matrices and len(weight.shape) == 2:
            values = torch.from_numpy(run.read(name, 2, "weight").values)
            assert torch.equal(values, weight.read().float()), name
            recorded += 1
    assert recorded > 1


def _flags(model):
    return {name: (type(each), each.requires_grad) for name, each in model.named_parameters()}


def _loss(model, inputs):
    if inputs is None:
        layers = model.base_model.model
        output = layers.linear(layers.embed(torch.arange(6)))
    else:
        output = model(inputs)
    output = output[0] if isinstance(output, tuple) or hasattr(output, "keys") else output
    return output.square().mean()
