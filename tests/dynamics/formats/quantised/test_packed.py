"""Integers in words of 32 bits: GPTQ, AWQ, compressed-tensors; and torchao's tensors."""

from pathlib import Path

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import FormatError
from dynamics.formats.quantised.codes import unpacked
from tests.dynamics.formats.quantised.checking import (
    NAME,
    floor_over_error,
    left_out,
    matrix,
    read,
    write,
)

torch = pytest.importorskip("torch")

MODULE = NAME.removesuffix(".weight")
# Layers of 32 x 64 in groups of 32, packed by auto-gptq 0.7.1 (pack of its QuantLinear, with the
# order of activations) and autoawq 0.2.9 (WQLinear_GEMM.from_linear). "expected" is what their own
# CPU paths compute: the layer applied to the identity in float32, and dequantize_gemm.
LIBRARIES = np.load(Path(__file__).with_name("packed_by_libraries.npz"))
GROUP = 32


def of_library(label):
    """Key -> tensor of a layer that a library packed."""
    return {
        f"{MODULE}.{key.split('.')[1]}": torch.tensor(LIBRARIES[key])
        for key in LIBRARIES
        if key.startswith(f"{label}.") and not key.endswith("expected")
    }


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_unpacked_in_their_order(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (3, 77))
    words = np.zeros((3, -(-77 * bits // 32)), dtype=np.int32)
    for row, values in enumerate(codes.tolist()):
        stream = sum(value << (bits * at) for at, value in enumerate(values))
        for word in range(words.shape[1]):
            words.view(np.uint32)[row, word] = (stream >> (32 * word)) & 0xFFFFFFFF
    np.testing.assert_array_equal(unpacked(words, bits, 77), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_dequantised_as_auto_gptq_does(tmp_path, bits):
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": True}
    folder = write(tmp_path, of_library(f"gptq{bits}"), config)
    np.testing.assert_array_equal(read(folder).values, LIBRARIES[f"gptq{bits}.expected"])
    assert list(dy.open_run(folder).matrices) == [NAME]
    assert not left_out(folder)


def test_the_zero_points_of_gptq_v2_are_not_shifted(tmp_path):
    stored = of_library("gptq4")
    config = {"quant_method": "gptq", "bits": 4}
    one = read(write(tmp_path / "v1", stored, config)).values
    stored[f"{MODULE}.qzeros"] += 0x11111111
    two = read(write(tmp_path / "v2", stored, {**config, "checkpoint_format": "gptq_v2"})).values
    np.testing.assert_array_equal(one, two)


def test_the_config_may_lie_in_a_file_of_its_own(tmp_path):
    folder = write(tmp_path, of_library("gptq4"))
    with pytest.raises(FormatError, match=f"no matrices.*only its config can tell.*{NAME}"):
        dy.open_run(folder)
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    np.testing.assert_array_equal(read(folder).values, LIBRARIES["gptq4.expected"])


def test_awq_is_dequantised_as_autoawq_does(tmp_path):
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    folder = write(tmp_path / "gemm", of_library("awq"), config)
    np.testing.assert_array_equal(read(folder).values, LIBRARIES["awq.expected"])
    folder = write(tmp_path / "gemv", of_library("awq"), {**config, "version": "gemv"})
    with pytest.raises(FormatError, match="quantised by awq, not dequantised: AWQ gemv"):
        dy.open_run(folder)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("g_idx", lambda each: each + 1, "names group 2 of 2"),
        ("g_idx", lambda each: each[:-1], "its g_idx has the shape"),
        ("qzeros", lambda each: each[:, :-1], "its qzeros has the shape"),
        ("qweight", lambda each: each[:, :-1], "its qweight has the shape"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(tmp_path, key, change, message):
    stored = of_library("gptq4")
    stored[f"{MODULE}.{key}"] = change(stored[f"{MODULE}.{key}"])
    with pytest.raises(FormatError, match=message):
        read(write(tmp_path, stored, {"quant_method": "gptq", "bits": 4}))


def scheme(library, **weights):
    """The scheme of compressed-tensors, and its config."""
    quantization = library.quantization
    args = quantization.QuantizationArgs(**weights)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        },
    }
    return quantization.QuantizationScheme(targets=["Linear"], weights=args), config


def by_compressed_tensors(weight, format, **weights):
    """(Tensors that compressed-tensors stores of a weight, its config, what it makes of them)."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    how, config = scheme(library, **weights)
    config["format"] = format
    tensor = torch.tensor(weight)
    group = how.weights.group_size or tensor.shape[1]
    blocks = tensor.reshape(len(tensor), -1, group)
    if how.weights.strategy == "tensor":
        blocks = tensor.reshape(1, 1, -1)
    if how.weights.strategy == "block":
        rows, cols = how.weights.block_structure
        blocks = tensor.unflatten(0, (-1, rows)).unflatten(2, (-1, cols)).transpose(1, 2).flatten(2)
    state = {"weight": tensor}
    given = {}
    if how.weights.strategy == "tensor_group":
        state["weight_global_scale"] = torch.tensor([448 * 6 / tensor.abs().max()])
        given["global_scale"] = state["weight_global_scale"]
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), how.weights, **given)
    if format.startswith("mx"):
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    state["weight_scale"] = scale.reshape(1) if how.weights.strategy == "tensor" else scale
    if not how.weights.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, how)
    back = compressor.decompress(dict(stored), how)["weight"]
    return {f"{MODULE}.{key}": each for key, each in stored.items()}, config, back.float().numpy()


INTEGERS = {"type": "int", "symmetric": True}
FLOATS = {"type": "float", "symmetric": True}
SCHEMES = {
    "int8 by channel": ("int-quantized", {**INTEGERS, "num_bits": 8, "strategy": "channel"}),
    "fp8 by tensor": ("float-quantized", {**FLOATS, "num_bits": 8, "strategy": "tensor"}),
    "fp8 by channel": ("float-quantized", {**FLOATS, "num_bits": 8, "strategy": "channel"}),
    "fp8 by block": (
        "float-quantized",
        {**FLOATS, "num_bits": 8, "strategy": "block", "block_structure": [64, 32]},
    ),
    "int4 by group": ("pack-quantized", {**INTEGERS, "num_bits": 4, "group_size": 32}),
    "int4 asymmetric": (
        "pack-quantized",
        {"type": "int", "symmetric": False, "num_bits": 4, "group_size": 32},
    ),
    "int3 by channel": ("pack-quantized", {**INTEGERS, "num_bits": 3, "strategy": "channel"}),
    "int8 packed": ("pack-quantized", {**INTEGERS, "num_bits": 8, "group_size": 64}),
    "mxfp4": ("mxfp4-pack-quantized", {**FLOATS, "num_bits": 4, "group_size": 32}),
    "mxfp8": (
        "mxfp8-quantized",
        {**FLOATS, "num_bits": 8, "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FLOATS, "num_bits": 4, "group_size": 16, "strategy": "tensor_group"},
    ),
}


def of_scheme(name, weight):
    """See `by_compressed_tensors`."""
    format, weights = SCHEMES[name]
    return by_compressed_tensors(weight, format, **weights)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(tmp_path, name):
    stored, config, expected = of_scheme(name, matrix("rows"))
    folder = write(tmp_path, stored, config)
    dense = read(folder)
    # The library multiplies in bfloat16 where a scale has this dtype.
    coarse = 2**-8 if "fp4" in name else 2**-22
    np.testing.assert_allclose(dense.values, expected, rtol=coarse)
    assert list(dy.open_run(folder).matrices) == [NAME]
    assert 1 < floor_over_error(dense, matrix("rows")) < 1.8


def test_schemes_are_told_apart_by_what_is_stored(tmp_path):
    other = "model.layers.0.mlp.down_proj"
    stored, config, expected = of_scheme("int4 by group", matrix())
    more, second, expected_more = of_scheme("fp8 by channel", matrix(seed=1))
    stored |= {key.replace(MODULE, other): each for key, each in more.items()}
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    second["config_groups"]["group_0"]["format"] = "float-quantized"
    config["config_groups"]["group_1"] = second["config_groups"]["group_0"]
    folder = write(tmp_path, stored, {**config, "format": "mixed-precision"})
    np.testing.assert_allclose(read(folder).values, expected, rtol=2**-22)
    np.testing.assert_allclose(read(folder, f"{other}.weight").values, expected_more, rtol=2**-22)


TORCHAO = {
    "Int8WeightOnlyConfig": {},
    "Float8WeightOnlyConfig": {},
    "IntxWeightOnlyConfig": {"weight_dtype": torch.int4},
}


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao(tmp_path, name):
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    layer = torch.nn.Sequential(torch.nn.Linear(384, 256, bias=False))
    layer[0].weight.data = torch.tensor(matrix("rows"))
    torchao.quantize_(layer, getattr(torchao, name)(**TORCHAO[name]))
    state = {NAME: layer[0].weight.data, "norm.weight": torch.ones(4)}
    stored, metadata = flatten_tensor_state_dict(state)
    folder = write(tmp_path, stored, {"quant_method": "torchao"}, metadata=metadata)
    dense = read(folder)
    expected = layer[0].weight.dequantize().float().numpy()
    np.testing.assert_allclose(dense.values, expected, rtol=2**-22)
    assert list(dy.open_run(folder).matrices) == [NAME]
    assert 1 < floor_over_error(dense, matrix("rows")) < 1.8


def by_gptq(weight, inputs, bits=4):
    """GPTQ (Frantar et al. 2022): each column is rounded, the next ones make up for its errors.

    Returns:
        (The rounded weight, the scale of each row.)
    """
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    scale = np.abs(weight).max(axis=1) / (2 ** (bits - 1) - 1)
    rest, rounded = weight.astype(np.float64).copy(), np.empty_like(weight, dtype=np.float64)
    for col in range(weight.shape[1]):
        limit = 2 ** (bits - 1) - 1
        rounded[:, col] = np.clip(np.round(rest[:, col] / scale), -limit, limit) * scale
        error = (rest[:, col] - rounded[:, col]) / upper[col, col]
        rest[:, col:] -= np.outer(error, upper[col, col:])
    return rounded, scale


def test_the_errors_of_gptq_exceed_the_floor(tmp_path):
    rng = np.random.default_rng(0)
    original = matrix(shape=(64, 96))
    inputs = rng.standard_normal((512, 96)) @ (rng.standard_normal((96, 96)) * 0.3 + np.eye(96))
    rounded, scale = by_gptq(original, inputs)
    codes = np.round(rounded / scale[:, None]).astype(np.uint32) + 8
    words = np.zeros((12, 64), dtype=np.uint32)
    for at in range(96):
        words[at // 8] |= codes[:, at] << np.uint32(4 * (at % 8))
    stored = {
        f"{MODULE}.qweight": torch.tensor(words.view(np.int32)),
        f"{MODULE}.qzeros": torch.full((1, 8), 0x77777777, dtype=torch.int32),
        f"{MODULE}.scales": torch.tensor(scale[None].astype(np.float32)),
        f"{MODULE}.g_idx": torch.zeros(96, dtype=torch.int32),
    }
    dense = read(write(tmp_path, stored, {"quant_method": "gptq", "bits": 4, "group_size": -1}))
    np.testing.assert_allclose(dense.values, rounded, rtol=1e-5)
    # The errors make up for each other where the inputs are large: their norm is not that of
    # independent ones. The floor is a lower bound.
    assert 0.4 < floor_over_error(dense, original) < 1
