"""Packed weights: unpacked by their own library or left out by name, never taken for numbers."""

import peft
import pytest
import torch
from torch import nn

from probes.model.weights import find_weights
from tests.probes.model.reading import by_name, read_all


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype)


def _bitsandbytes_4bit(quant_type="nf4"):
    bnb = pytest.importorskip("bitsandbytes")
    model, plain = _model(), _model()
    layer = bnb.nn.Linear4bit(128, 64, quant_type=quant_type, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(plain[0].weight.data, False, quant_type=quant_type)
    layer.bias = plain[0].bias
    model[0] = layer.to("cpu")
    model.is_loaded_in_4bit = True  # as transformers says, and PEFT asks
    return model


def _bitsandbytes_8bit():
    bnb = pytest.importorskip("bitsandbytes")
    model, plain = _model(), _model()
    layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    layer.load_state_dict(plain[0].state_dict())
    model[0] = layer.to("cpu")
    model.is_loaded_in_8bit = True
    return model


def _torchao(name, **options):
    quantization = pytest.importorskip("torchao.quantization")
    model = _model(torch.bfloat16)
    config = getattr(quantization, name)(**options)
    quantization.quantize_(model, config, filter_fn=lambda _, name: name == "0")
    return model


def _quanto():
    quanto = pytest.importorskip("optimum.quanto")
    model = _model()
    quanto.quantize(model, weights=quanto.qint8, include="0")
    quanto.freeze(model)
    return model


def _hqq():
    hqq = pytest.importorskip("hqq.core.quantize")
    model = _model()
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    model[0] = hqq.HQQLinear(model[0], config, compute_dtype=torch.float32, device="cpu")
    return model


def _torch_dynamic():
    return torch.ao.quantization.quantize_dynamic(
        _model(), {"0": torch.ao.quantization.default_dynamic_qconfig}
    )


def _float8():
    model = _model()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), False)
    return model


def _float8_in_blocks():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model = _model()
    layer = fp8.FP8Linear(128, 64, block_size=(48, 48), has_bias=True)
    with torch.no_grad():
        layer.weight.copy_(model[0].weight * 300)
        layer.weight_scale_inv.uniform_(0.5, 2)
        layer.bias.copy_(model[0].bias)
    layer.requires_grad_(False)
    model[0] = layer
    return model


READABLE = {
    "bitsandbytes_nf4": _bitsandbytes_4bit,
    "bitsandbytes_fp4": lambda: _bitsandbytes_4bit("fp4"),
    "bitsandbytes_int8": _bitsandbytes_8bit,
    "torchao_int8": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao_float8": lambda: _torchao("Float8WeightOnlyConfig"),
    "torchao_int4": lambda: _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "quanto": _quanto,
    "hqq": _hqq,
    "torch_dynamic": _torch_dynamic,
    "float8": _float8,
    "float8_in_blocks": _float8_in_blocks,
}


@pytest.mark.parametrize("case", READABLE)
def test_the_weight_is_what_the_layer_multiplies_with(case):
    model = READABLE[case]()
    values = read_all(model)
    assert set(values) - {"0.bias"} == {"0.weight", "2.weight", "2.bias"}  # it may be no parameter
    weight = by_name(model)[0]["0.weight"]
    assert weight.shape == (64, 128)
    assert (weight.parameter is None) == (case != "float8")  # which are numbers without scales
    assert values["0.weight"].is_floating_point()
    if case not in ("float8", "float8_in_blocks"):  # no product on a CPU
        x = torch.eye(128, dtype=next(model[2].parameters()).dtype)
        got = (model[0](x) - model[0](0 * x)).float()
        torch.testing.assert_close(got.T, values["0.weight"].float(), rtol=0.02, atol=2e-3)
        # bitsandbytes moves the scales of int8 in its first forward pass
        assert torch.equal(weight.read(), values["0.weight"])
    close = torch.nn.functional.cosine_similarity(
        values["0.weight"].float().flatten(), _model()[0].weight.flatten(), dim=0
    )
    assert close > (0.9 if case == "float8_in_blocks" else 0.99)


ADAPTABLE = ["bitsandbytes_nf4", "bitsandbytes_int8", "torchao_int8", "hqq", "float8"]


@pytest.mark.parametrize("case", ADAPTABLE)
def test_the_factors_are_recorded_and_the_weight_is_the_unpacked_base_with_the_adapter(case):
    base = read_all(READABLE[case]())["0.weight"]
    model = _adapted(READABLE[case]())
    weight = by_name(model)[0]["0.weight"]
    layer = model.base_model.model[0]
    assert torch.equal(weight.base().float(), base.float())
    expected = base.clone() if base.dtype.itemsize > 1 else base.float()
    expected += layer.get_delta_weight("default")
    assert torch.equal(read_all(model)["0.weight"], expected)
    a, b, scaling, transposed = weight.factors()
    assert (tuple(a.shape), tuple(b.shape), scaling, transposed) == ((2, 128), (64, 2), 3.0, False)


def _adapted(model, **options):
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.parametrize("case", ["bitsandbytes_nf4", "bitsandbytes_int8", "hqq"])
def test_dora_on_a_packed_base_is_what_the_layer_computes_with(case):
    model = _adapted(READABLE[case](), use_dora=True)
    with torch.no_grad():
        model.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.5)
    values = read_all(model)
    x = torch.eye(128)
    layer = model.base_model.model[0]
    got = layer(x).detach() - values.get("0.bias", layer.base_layer.bias)
    torch.testing.assert_close(got.T, values["0.weight"], rtol=0.02, atol=0.01)
    assert by_name(model)[0]["0.weight"].factors() is None


class GptqLinear(nn.Module):
    """The tensors of a layer of GPTQ, which nothing unpacks on a CPU."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 128, 64
        self.register_buffer("qweight", torch.zeros(16, 64, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 64, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return x @ torch.zeros(128, 64) + self.bias


def _gptq():
    model = _model()
    model[0] = GptqLinear()
    return model


def test_a_layer_that_nothing_unpacks_is_left_out_by_name():
    model = _gptq()
    assert set(read_all(model)) == {"0.bias", "2.weight", "2.bias"}
    (left,) = find_weights(model)[1]
    assert (left.name, left.shape, left.numbers) == ("0.weight", (64, 128), 64 * 128)
    assert left.reason == "packed weights (GptqLinear)"


def test_its_adapter_is_recorded_nevertheless():
    from peft.tuners.lora.gptq import GPTQLoraLinear

    model = _gptq()
    config = peft.LoraConfig(r=2, lora_alpha=6)
    model[0] = GPTQLoraLinear(model[0], "default", config=config, r=2, lora_alpha=6)
    assert set(read_all(model)) == {"0.bias", "2.weight", "2.bias"}
    weights, reasons = by_name(model)
    weight = weights["0.weight"]
    assert not weight.readable
    assert weight.shape == (64, 128)
    assert weight.factors().scaling == 3.0
    with pytest.raises(TypeError, match="cannot be read"):
        weight.read()
    assert reasons["0.weight"] == "packed weights (GptqLinear)"
    assert reasons["0.lora_A.default.weight"] == "adapter factors"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_what_is_no_real_number_is_left_out_beside_the_weight(dtype):
    model = nn.Linear(8, 8)
    model.codes = nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False)
    assert set(read_all(model)) == {"weight", "bias"}
    name = str(dtype).removeprefix("torch.")
    assert by_name(model)[1] == {"codes": f"parameters without real numbers ({name})"}


def test_what_has_no_numbers_yet_is_left_out():
    with torch.device("meta"):
        meta = nn.Linear(8, 4)
    empty = nn.Linear(4, 4)
    empty.rows = nn.Parameter(torch.zeros(0, 4))
    empty.one = nn.Parameter(torch.tensor(2.0))
    model = nn.ModuleDict({"meta": meta, "lazy": nn.LazyLinear(4), "empty": empty})
    weights, not_read = find_weights(model)
    assert {each.name: each.shape for each in weights} == {
        "empty.weight": (4, 4),
        "empty.bias": (4,),
        "empty.one": (),
    }
    assert {each.name: (each.shape, each.reason) for each in not_read} == {
        "meta.weight": ((4, 8), "parameters on the meta device"),
        "meta.bias": ((4,), "parameters on the meta device"),
        "lazy.weight": ((), "parameters that are not initialised yet"),
        "lazy.bias": ((), "parameters that are not initialised yet"),
        "empty.rows": ((0, 4), "parameters without numbers"),
    }
