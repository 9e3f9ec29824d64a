"""Four-bit floats and int8, each dequantised by the library that wrote it."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import FormatError
from tests.dynamics.formats.quantised.checking import (
    NAME,
    floor_over_error,
    left_out,
    matrix,
    read,
    write,
)

torch = pytest.importorskip("torch")

KINDS = ["Gaussian", "rows", "rank 16"]


def by_bitsandbytes(weight, kind="nf4", nested=False, dtype="float32", blocksize=64):
    """What bitsandbytes stores of a weight, and what it makes of that."""
    functional = pytest.importorskip("bitsandbytes").functional
    codes, state = functional.quantize_4bit(
        torch.tensor(weight).to(getattr(torch, dtype)),
        blocksize=blocksize,
        quant_type=kind,
        compress_statistics=nested,
    )
    stored = {NAME: codes}
    stored |= {f"{NAME}.{key}": each for key, each in state.as_dict(packed=True).items()}
    return stored, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(256, 384), (34, 50)])  # rows that end inside a block
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitsandbytes_four_bits(tmp_path, kind, nested, shape, dtype):
    stored, expected = by_bitsandbytes(matrix(shape=shape), kind, nested, dtype)
    folder = write(tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    dense = read(folder)
    assert dense.dtype == dtype
    np.testing.assert_array_equal(
        torch.tensor(dense.values).to(expected.dtype).float().numpy(), expected.float().numpy()
    )
    assert list(dy.open_run(folder).matrices) == [NAME]
    assert not left_out(folder)


def test_bitsandbytes_needs_no_config(tmp_path):
    stored, expected = by_bitsandbytes(matrix())
    np.testing.assert_array_equal(read(write(tmp_path, stored)).values, expected.numpy())


def test_bitsandbytes_int8(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    codes, scale, _ = functional.int8_vectorwise_quant(torch.tensor(matrix("rows")).half())
    expected = functional.int8_vectorwise_dequant(codes, scale).numpy()
    module = NAME.removesuffix(".weight")
    stored = {NAME: codes, f"{module}.SCB": scale, f"{module}.weight_format": torch.tensor(0)}
    dense = read(write(tmp_path, stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}))
    np.testing.assert_allclose(dense.values, expected, rtol=1.2e-7)
    assert 1 < floor_over_error(dense, matrix("rows")) < 1.6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_the_floor_of_four_bits_covers_their_errors(tmp_path, kind, book):
    stored, _ = by_bitsandbytes(matrix(kind), book)
    assert 1 < floor_over_error(read(write(tmp_path, stored)), matrix(kind)) < 1.8


def test_a_product_of_rank_16_keeps_its_rank(tmp_path):
    rng = np.random.default_rng(0)
    product = (rng.standard_normal((256, 16)) @ rng.standard_normal((16, 256))).astype(np.float32)
    folder = write(tmp_path, by_bitsandbytes(product)[0])
    measured = dy.analyze(folder, kinds=["weight"]).sel(matrix=NAME)
    assert measured["numerical_rank"].item() == 16
    rounded = dy.spectrum(torch.tensor(read(folder).values).bfloat16())
    assert dy.METRICS["numerical_rank"].function(rounded) > 200  # above the floor of bfloat16
    true = dy.METRICS["effective_rank"].function(dy.spectrum(product))
    assert measured["effective_rank_above_floor"].item() == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [2**40, 2**40]}, "names the shape"),
        ({"shape": [512, 512]}, "a shape"),
        ({"shape": "x"}, "names the shape"),
        ({"blocksize": 0}, "blocks of 0"),
        ({"blocksize": 128}, "its absmax has the shape"),
        ("no JSON", "no JSON"),
        ("[]", "no JSON object"),
    ],
)
def test_a_damaged_state_is_one_line(tmp_path, change, message):
    stored, _ = by_bitsandbytes(matrix())
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    state = json.loads(stored[key].numpy().tobytes())
    text = change if isinstance(change, str) else json.dumps(state | change)
    stored[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(FormatError, match=message):
        read(write(tmp_path, stored))


def mxfp4(weight):
    """Blocks and scales of gpt-oss, of (E, out, in): the largest number of a group gets 4 to 6."""
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True))) - 2
    book = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    book = np.concatenate([book, -book])
    codes = np.abs(groups[..., None] / 2.0 ** exponents[..., None] - book).argmin(-1)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return (
        torch.tensor(packed, dtype=torch.uint8),
        torch.tensor(exponents[..., 0] + 127).to(torch.uint8),
    )


def test_experts_of_gpt_oss(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = "model.layers.0.mlp.experts"
    stored, expected = {}, {}
    for name, outputs, inputs in (("gate_up_proj", 128, 64), ("down_proj", 64, 64)):
        weights = np.stack([matrix(shape=(outputs, inputs), seed=e) for e in range(3)])
        packed = mxfp4(weights)
        stored |= dict(zip((f"{path}.{name}_blocks", f"{path}.{name}_scales"), packed, strict=True))
        stored[f"{path}.{name}_bias"] = torch.ones(3, outputs)
        expected[name] = convert_moe_packed_tensors(*packed, dtype=torch.float32).numpy()
    folder = write(
        tmp_path, stored, {"quant_method": "mxfp4"}, model_type="gpt_oss", hidden_size=64
    )
    run = dy.open_run(folder)
    assert len(run.matrices) == 9
    for expert in range(3):
        up = expected["gate_up_proj"][expert]
        for module, values in (
            ("gate_proj", up[:, ::2]),
            ("up_proj", up[:, 1::2]),
            ("down_proj", expected["down_proj"][expert]),
        ):
            found = run.read(f"{path}.{expert}.{module}.weight", int(run.steps[0]), "weight")
            np.testing.assert_array_equal(found.values, values)
            assert found.errors.variance().shape == values.shape
    original = matrix(shape=(64, 64), seed=1).T
    assert 1 < floor_over_error(read(folder, f"{path}.1.down_proj.weight"), original) < 1.8


def test_one_expert_is_read_alone(tmp_path, monkeypatch):
    from dynamics.formats.storage import tensors

    path = "model.layers.0.mlp.experts"
    packed = mxfp4(np.stack([matrix(shape=(64, 64), seed=e) for e in range(8)]))
    stored = dict(
        zip((f"{path}.down_proj_blocks", f"{path}.down_proj_scales"), packed, strict=True)
    )
    folder = write(tmp_path, stored, {"quant_method": "mxfp4"}, model_type="gpt_oss")
    run = dy.open_run(folder)
    read_bytes = []
    read_range = tensors.read_range
    monkeypatch.setattr(
        tensors,
        "read_range",
        lambda path, first, length: read_bytes.append(length) or read_range(path, first, length),
    )
    run.read(f"{path}.5.down_proj.weight", int(run.steps[0]), "weight")
    assert sum(read_bytes) == 64 * 64 // 2 + 64 * 2


def test_scales_that_are_missing_or_do_not_fit(tmp_path):
    path = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = mxfp4(np.stack([matrix(shape=(64, 64), seed=e) for e in range(2)]))
    other = {"model.norm_proj.weight": torch.ones(4, 4)}
    folder = write(tmp_path / "missing", {f"{path}_blocks": blocks, **other})
    assert "its scales is missing" in left_out(folder)[path]
    stored = {f"{path}_blocks": blocks, f"{path}_scales": scales[:, :8]}
    with pytest.raises(FormatError, match="its scales has the shape"):
        read(
            write(tmp_path / "short", stored),
            f"{path.removesuffix('.down_proj')}.1.down_proj.weight",
        )


def test_a_distributed_checkpoint_of_quantised_weights(tmp_path):
    import torch.distributed.checkpoint as dcp

    stored, expected = by_bitsandbytes(matrix(), nested=True)
    stored["model.norm_proj.weight"] = torch.ones(4, 4)
    stored["model.mask"] = torch.ones(4, 4, dtype=torch.int64)
    dcp.save({"model": stored}, checkpoint_id=tmp_path / "step-10", no_dist=True)
    run = dy.open_run(tmp_path)
    assert set(run.matrices) == {NAME, "model.norm_proj.weight"}
    np.testing.assert_array_equal(run.read(NAME, 10, "weight").values, expected.numpy())
    assert {each.name: each.reason for each in run.account.left_out} == {
        "model.mask": "integers (indices, masks)"
    }


def test_nvfp4_of_modelopt(tmp_path):
    # NVFP4QTensor.dequantize of nvidia-modelopt 0.47: the low half of a byte is the first number,
    # and a block of 16 is multiplied with weight_scale · weight_scale_2.
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (32, 64))
    scale = torch.tensor(rng.uniform(1, 400, (32, 4))).to(torch.float8_e4m3fn)
    book = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = np.array([*book, *(-each for each in book)])[codes]
    expected = values * scale.double().numpy().repeat(16, 1) * 0.25
    stored = {
        NAME: torch.tensor(codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        f"{NAME}_scale": scale,
        f"{NAME}_scale_2": torch.tensor(0.25),
        NAME.replace("weight", "input_scale"): torch.tensor(1.0),
    }
    folder = write(tmp_path, stored)
    with pytest.raises(
        FormatError, match="an unknown method is not known to have a weight_scale_2"
    ):
        dy.open_run(folder)
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    np.testing.assert_array_equal(read(folder).values, expected)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("hqq", {"W_q": torch.uint8, "scale": torch.float32, "zero": torch.float32}),
        ("quanto", {"weight._data": torch.uint8, "weight._scale": torch.float32}),
        ("aqlm", {"codes": torch.int8, "codebooks": torch.float16, "scales": torch.float16}),
        ("bitnet", {"weight": torch.uint8, "weight_scale": torch.float32}),
        ("vptq", {"indices": torch.int32, "centroids.weight": torch.float16}),
        ("eetq", {"weight": torch.int8, "weight_scales": torch.float16}),
        ("fp_quant", {"qweight": torch.uint8, "forward_hadamard_matrix": torch.float16}),
        ("exl2", {"q_weight": torch.int32, "q_scale": torch.int32, "q_groups": torch.int16}),
        ("sparse", {"weight.bitmask": torch.uint8, "weight.compressed": torch.float16}),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_other_methods_are_left_out_by_name(tmp_path, method, keys, with_config):
    module = NAME.removesuffix(".weight")
    stored = {f"{module}.{key}": torch.ones(8, 8).to(dtype) for key, dtype in keys.items()}
    stored |= {"model.norm_proj.weight": torch.ones(4, 4), f"{module}.bias": torch.ones(8)}
    folder = write(tmp_path, stored, {"quant_method": method} if with_config else None)
    if not with_config and method == "vptq":
        pytest.skip("nothing in the file says that it is quantised")
    run = dy.open_run(folder)
    assert list(run.matrices) == ["model.norm_proj.weight"]
    reasons = left_out(folder)
    named = method if with_config else "an unknown method"
    assert f"quantised by {named}, not dequantised" in reasons.pop(NAME)
    assert set(reasons) == {f"{module}.bias"}
