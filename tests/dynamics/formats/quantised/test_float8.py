"""FP8 and int8 beside their scales, as transformers, fbgemm and compressed-tensors store them."""

from types import SimpleNamespace

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import FormatError
from dynamics.formats.quantised.dequantise import dequantised
from tests.dynamics.formats.quantised.checking import (
    NAME,
    floor_over_error,
    left_out,
    matrix,
    read,
    write,
)

torch = pytest.importorskip("torch")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

BLOCKS = {"quant_method": "fp8", "weight_block_size": [64, 32]}


def by_transformers(weight, block=(64, 32), scale_fmt="float"):
    """Codes and scales of transformers' own quantiser, and what its dequantiser gives."""
    config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(quantization_config=config)
    stored = fp8.Fp8Quantize(quantizer)._quantize_one(NAME, torch.tensor(weight))
    codes, scale = stored.values()
    back = fp8.Fp8Dequantize(quantizer)._dequantize_one(codes, scale, torch.float32)
    return {NAME: codes, f"{NAME}_scale_inv": scale}, back.numpy()


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_blocks_are_dequantised_as_transformers_does(tmp_path, scale_fmt):
    stored, expected = by_transformers(matrix("rows"), scale_fmt=scale_fmt)
    np.testing.assert_array_equal(read(write(tmp_path, stored, BLOCKS)).values, expected)


def test_experts_in_blocks_are_dequantised_as_transformers_does(tmp_path):
    path = "model.layers.0.mlp.experts.down_proj"
    config = SimpleNamespace(weight_block_size=(64, 32), scale_fmt="float")
    quantizer = SimpleNamespace(quantization_config=config)
    weights = torch.tensor(np.stack([matrix(shape=(128, 64), seed=e) for e in range(3)]))
    stored = fp8.Fp8Quantize(quantizer)._quantize_one(path, weights)
    expected = fp8.Fp8Dequantize(quantizer)._dequantize_one(*stored.values(), torch.float32)
    folder = write(tmp_path, stored, BLOCKS, model_type="qwen3_moe")
    for expert in range(3):
        dense = read(folder, f"model.layers.0.mlp.experts.{expert}.down_proj.weight")
        np.testing.assert_array_equal(dense.values, expected[expert].numpy())
        assert 1 < floor_over_error(dense, weights[expert].numpy()) < 1.6


def test_the_last_block_may_be_smaller(tmp_path):
    weight = torch.tensor(matrix(shape=(100, 70)))
    scale = torch.rand(2, 3) + 0.5
    stored = {NAME: weight.to(torch.float8_e4m3fn), f"{NAME}_scale_inv": scale}
    rows, cols = np.arange(100) // 64, np.arange(70) // 32
    expected = stored[NAME].float().numpy() * scale.numpy()[rows][:, cols]
    np.testing.assert_array_equal(read(write(tmp_path, stored, BLOCKS)).values, expected)


def test_packed_pairs_of_fp4_are_dequantised_as_transformers_does(tmp_path):
    codes = torch.randint(-128, 127, (64, 48), dtype=torch.int8)
    scale = torch.randint(120, 130, (64, 3), dtype=torch.uint8)
    expected = fp8.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32).numpy()
    stored = {NAME: codes, f"{NAME}_scale_inv": scale}
    np.testing.assert_array_equal(read(write(tmp_path, stored, BLOCKS)).values, expected)


@pytest.mark.parametrize("shape", [(), (1,), (256,), (256, 1)])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", None])
def test_one_scale_or_one_per_output(tmp_path, shape, method):
    codes = torch.tensor(matrix()).mul(1000).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    folder = write(
        tmp_path, {NAME: codes, f"{NAME}_scale": scale}, method and {"quant_method": method}
    )
    expected = codes.double().numpy() * scale.double().numpy().reshape(-1, 1)
    np.testing.assert_array_equal(read(folder).values, expected.astype(np.float32))
    assert list(dy.open_run(folder).matrices) == [NAME]  # no scale is a matrix


def test_experts_of_llama4_have_one_scale_per_output(tmp_path):
    # transformers' FbgemmFp8Llama4TextExperts: (E, in, out), and scales (E, 1, out) and (E, out, 1)
    path = "model.layers.0.feed_forward.experts"
    up, down = torch.randn(2, 6, 16), torch.randn(2, 8, 6)
    scales = torch.rand(2, 1, 16) + 0.5, torch.rand(2, 6, 1) + 0.5
    stored = {
        f"{path}.gate_up_proj": up.to(torch.float8_e4m3fn),
        f"{path}.gate_up_proj_scale": scales[0],
        f"{path}.down_proj": down.to(torch.float8_e4m3fn),
        f"{path}.down_proj_scale": scales[1],
    }
    folder = write(
        tmp_path,
        stored,
        {"quant_method": "fbgemm_fp8"},
        model_type="llama4_text",
        hidden_size=6,
    )
    up, down = (stored[f"{path}.{name}"].float() for name in ("gate_up_proj", "down_proj"))
    up, down = up * scales[0], down * scales[1].transpose(1, 2)
    for expert in range(2):
        expected = {"gate_proj": up[expert, :, :8], "up_proj": up[expert, :, 8:]}
        expected["down_proj"] = down[expert]
        for module, values in expected.items():
            found = read(folder, f"{path}.{expert}.{module}.weight")
            np.testing.assert_array_equal(found.values, values.numpy())
            assert found.errors.variance().shape == values.shape


@pytest.mark.parametrize("kind", ["Gaussian", "rows", "rank 16"])
def test_the_floor_is_that_of_the_codes(tmp_path, kind):
    original = matrix(kind)
    stored, _ = by_transformers(original)
    dense = read(write(tmp_path, stored, BLOCKS))
    assert 1 < floor_over_error(dense, original) < 1.6
    unpacked = dy.spectrum(torch.tensor(dense.values).bfloat16()).noise_floor
    assert dy.spectrum(dense).noise_floor > 5 * unpacked


def test_an_update_in_fp8_has_the_floor_of_both_codes(tmp_path):
    originals = [matrix(), matrix() + 1e-4 * matrix(seed=1)]
    for step, each in enumerate(originals):
        write(tmp_path / f"checkpoint-{step + 1}", by_transformers(each)[0], BLOCKS)
    measured = dy.analyze(tmp_path, kinds=["update", "weight"]).sel(matrix=NAME)
    weight = measured["noise_floor"].sel(kind="weight")
    update = measured["noise_floor"].sel(kind="update", step=2)
    assert float(update) == pytest.approx(np.sqrt((weight**2).sum().item()), rel=0.05)


def test_scales_that_do_not_fit_are_one_line(tmp_path):
    stored, _ = by_transformers(matrix())
    stored[f"{NAME}_scale_inv"] = torch.ones(3, 12)
    with pytest.raises(FormatError, match=r"a scale of shape \(3, 12\) beside codes of shape"):
        read(write(tmp_path, stored, BLOCKS))


@pytest.mark.parametrize(
    ("missing", "quantisation", "reason"),
    [
        ("_scale_inv", BLOCKS, "quantised by fp8, not dequantised"),
        ("_scale_inv", {"quant_method": "unheard_of"}, "quantised by unheard_of, not dequantised"),
        (None, {"quant_method": "quark"}, "quark is not known"),
        (None, {"quant_method": "fp8", "weight_block_size": ["a", 1]}, "blocks of"),
    ],
)
def test_what_is_not_dequantised_is_left_out_by_name(tmp_path, missing, quantisation, reason):
    stored, _ = by_transformers(matrix())
    if missing:
        del stored[NAME + missing]
    stored["model.norm_proj.weight"] = torch.ones(4, 4)
    folder = write(tmp_path, stored, quantisation)
    assert reason in left_out(folder)[NAME]
    assert list(dy.open_run(folder).matrices) == ["model.norm_proj.weight"]


def test_float8_without_scale_or_config_is_measured_as_it_is(tmp_path):
    codes = torch.tensor(matrix()).to(torch.float8_e4m3fn)
    dense = read(write(tmp_path, {NAME: codes}))
    assert dense.dtype == "float8_e4m3fn"
    assert dense.errors is None


def test_the_origin_changes_with_codes_scales_and_scheme():
    def origin(codes="c", scale="s", config=BLOCKS):
        tensors = {
            NAME: SimpleNamespace(shape=(64, 64), dtype="float8_e4m3fn", origin=codes),
            f"{NAME}_scale_inv": SimpleNamespace(shape=(1, 2), dtype="float32", origin=scale),
        }
        return dequantised(tensors, {"quantization_config": config})[0][NAME].origin

    other = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    changed = [origin(), origin(codes="C"), origin(scale="S"), origin(config=other)]
    assert len(set(changed)) == 4
    assert origin() == changed[0]
    assert origin(scale=None) is None
