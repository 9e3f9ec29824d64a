"""GGUF files, written and dequantised by the gguf package."""

import builtins
import struct
import sys

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import DynamicsError, FormatError
from dynamics.formats.storage import gguf_files
from tests.dynamics.formats.quantised.checking import floor_over_error, matrix

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

STORED, NAME = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
WRITTEN = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
WRITTEN += ["MXFP4"]
ALL = sorted({*gguf_files._TYPES.values()} - {"F64", "I8", "I16", "I32", "I64"})


def write(path, tensors, **values):
    """A GGUF file of (bytes or floats, type) by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("some.numbers", [1, 2, 3])
    for key, value in values.items():
        writer.add_uint32(key, value)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(type, shape=(64, 512), seed=0):
    """Bytes of a type that the package cannot quantise to; their scales are ordinary numbers."""
    numbers, size = gguf.GGML_QUANT_SIZES[Type[type]]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.02, data.shape[:-1]).astype(np.float16).view(np.uint8)
    scale = scale.reshape(*data.shape[:-1], 2)
    if type in ("Q2_K",):
        data[..., 80:82] = data[..., 82:84] = scale
    elif type in ("Q3_K", "Q6_K", "TQ1_0", "TQ2_0"):
        data[..., -2:] = scale
    elif type == "IQ1_M":
        data[..., 48:56] = 0x3C
    elif type in ("MXFP4", "NVFP4"):
        data[..., :4] = 120
    else:
        data[..., :2] = scale
        if type in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
            data[..., 2:4] = scale
    return data.reshape(*shape[:-1], -1)


@pytest.mark.parametrize("type", ALL)
def test_every_type_has_the_values_of_the_package(tmp_path, type):
    if type in ("F32", "F16", "BF16"):
        data = gguf.quantize(matrix(shape=(64, 512)), Type[type])
    else:
        data = random_blocks(type)
    path = write(tmp_path / "model.gguf", {STORED: (data, Type[type])})
    dense = dy.open_run(path).read(NAME, 0, "weight")
    np.testing.assert_array_equal(dense.values, gguf.dequantize(data, Type[type]))
    assert 0 < dy.spectrum(dense).noise_floor < np.inf
    numbers, size = gguf.GGML_QUANT_SIZES[Type[type]]
    assert gguf_files.BLOCKS[type] == (numbers, size)


@pytest.mark.parametrize("type", WRITTEN[3:])
@pytest.mark.parametrize("kind", ["Gaussian", "rows", "rank 16"])
def test_the_floor_covers_the_errors_of_the_codes(tmp_path, type, kind):
    original = matrix(kind, shape=(128, 512))
    data = gguf.quantize(original, Type[type])
    path = write(tmp_path / "model.gguf", {STORED: (data, Type[type])})
    dense = dy.open_run(path).read(NAME, 0, "weight")
    ternary = type.startswith("TQ")  # far from uniform: most numbers are rounded to 0
    assert (0.4 if ternary else 0.95) < floor_over_error(dense, original) < 2


@pytest.mark.parametrize("type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_the_floor_is_the_distance_of_neighbouring_codes(tmp_path, type):
    # Change one code of one number by one: no number may move by more than twice its largest error.
    data = random_blocks(type)
    path = write(tmp_path / "model.gguf", {STORED: (data, Type[type])})
    dense = dy.open_run(path).read(NAME, 0, "weight")
    spacing = dense.errors.spacing()
    levels = np.stack(
        [
            gguf.dequantize(_with_codes(type, data, code), Type[type]).astype(np.float64)
            for code in range(16 if type not in ("Q2_K", "Q3_K") else 4)
        ]
    )
    gaps = np.diff(np.sort(levels, axis=0), axis=0)
    if type.startswith("IQ4"):
        assert (spacing <= gaps.max(axis=0) * 1.0001).all()
        assert (spacing >= gaps.min(axis=0) * 0.9999).all()
    else:
        np.testing.assert_allclose(spacing, gaps[0], rtol=1e-3, atol=1e-6)


def _with_codes(type, data, code):
    """The same blocks, with one code for all numbers (their low bits; the high ones are 0)."""
    from dynamics.formats.quantised.gguf import _HIGH, _LINEAR

    where, one, _ = _LINEAR[type]
    blocks = data.reshape(len(data), -1, gguf_files.BLOCKS[type][1]).copy()
    blocks[..., where] = one * code
    if type in _HIGH:
        blocks[..., _HIGH[type]] = 0
    return blocks.reshape(data.shape)


def test_names_steps_experts_and_what_is_left_out(tmp_path):
    for step in (100, 200):
        tensors = {
            "token_embd.weight": (matrix(shape=(40, 32)), None),
            "output_norm.weight": (np.ones(32, np.float32), None),
            "blk.0.attn_q.weight": (matrix(shape=(32, 32)), None),
            "blk.0.ffn_up_exps.weight": (
                gguf.quantize(
                    np.stack([matrix(shape=(64, 32), seed=e) for e in (0, 1)]), Type.Q8_0
                ),
                Type.Q8_0,
            ),
        }
        write(tmp_path / f"model-step{step}-Q8_0.gguf", tensors)
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [100, 200]
    assert set(run.matrices) == {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
    }
    dense = run.read("model.layers.0.mlp.experts.1.up_proj.weight", 100, "weight")
    assert 0.95 < floor_over_error(dense, matrix(shape=(64, 32), seed=1)) < 2
    assert dy.open_run(tmp_path / "model-step100-Q8_0.gguf").steps.tolist() == [100]


def test_a_type_that_is_not_known_is_left_out_by_name(tmp_path, monkeypatch):
    data = random_blocks("Q4_0")
    tensors = {STORED: (data, Type.Q4_0), "output.weight": (matrix(), None)}
    path = write(tmp_path / "model.gguf", tensors)
    monkeypatch.delitem(gguf_files._TYPES, int(Type.Q4_0))
    run = dy.open_run(path)
    assert list(run.matrices) == ["lm_head.weight"]
    reasons = {each.name: (each.shape, each.reason) for each in run.account.left_out}
    assert reasons[NAME] == ((64, 512), "quantised as GGUF type 2, not dequantised")


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    plain = write(tmp_path / "plain/model.gguf", {STORED: (matrix(), None)})
    path = write(tmp_path / "model.gguf", {STORED: (random_blocks("Q4_0"), Type.Q4_0)})
    for name in [each for each in sys.modules if each.split(".")[0] == "gguf"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name.split(".")[0] == "gguf":
            raise ImportError(name="gguf")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    assert dy.open_run(plain).read(NAME, 0, "weight").dtype == "float32"
    with pytest.raises(DynamicsError, match=r"pip install 'learning-dynamics\[gguf\]'"):
        dy.open_run(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:100], "truncated or damaged"),
        (lambda raw: b"GGML" + raw[4:], "does not begin with GGUF"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian"),
        (lambda raw: raw[:8] + struct.pack("<Q", 2**60) + raw[16:], "would have"),
        (lambda raw: raw[:16] + struct.pack("<Q", 2**60) + raw[24:], "would have"),
        (lambda raw: raw[:-1000], "would end at byte"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, message):
    path = write(tmp_path / "model.gguf", {STORED: (random_blocks("Q4_0"), Type.Q4_0)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FormatError, match=message):
        dy.open_run(path)
