"""Whatever is damaged in a quantised checkpoint, reading it gives matrices or one line.

See `test_parsers`. The seeds are small checkpoints of each kind of quantised weight, made here bit
by bit, so that they need none of the libraries that write them.
"""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dynamics.formats.quantised.checking import NAME, write
from tests.dynamics.fuzz.mutations import damaged_bytes, damaged_json, encoded
from tests.dynamics.fuzz.test_parsers import damaged_copy, fuzz, read_all

torch = pytest.importorskip("torch")

MODULE = NAME.removesuffix(".weight")
MODEL, CONFIG = "model.safetensors", "config.json"
STATE = {
    "blocksize": 64,
    "shape": [32, 64],
    "dtype": "bfloat16",
    "nested_blocksize": 256,
    "nested_offset": 0.1,
}


def random(dtype, *shape):
    """A tensor of random bytes."""
    item = torch.empty(0, dtype=dtype).element_size()
    raw = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] * item), np.uint8)
    return torch.tensor(raw).view(dtype)


def bitsandbytes_keys():
    text = json.dumps(STATE).encode()
    return {
        NAME: random(torch.uint8, 32 * 32, 1),
        f"{NAME}.absmax": random(torch.uint8, 32),
        f"{NAME}.quant_map": torch.linspace(-1, 1, 16),
        f"{NAME}.nested_absmax": torch.ones(1),
        f"{NAME}.nested_quant_map": torch.linspace(0, 1, 256),
        f"{NAME}.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }


def gptq_keys():
    return {
        f"{MODULE}.qweight": random(torch.int32, 8, 32),
        f"{MODULE}.qzeros": random(torch.int32, 2, 4),
        f"{MODULE}.scales": torch.ones(2, 32).half(),
        f"{MODULE}.g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
CHECKPOINTS = {
    "fp8": (
        {NAME: torch.ones(32, 64).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(2, 2)},
        {"quant_method": "fp8", "weight_block_size": [16, 32]},
    ),
    "nf4": (bitsandbytes_keys(), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "int8": (
        {NAME: random(torch.int8, 32, 64), f"{MODULE}.SCB": torch.ones(32)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "gptq": (gptq_keys(), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "mxfp4": (
        {
            "layers.0.experts.down_proj_blocks": random(torch.uint8, 2, 32, 2, 16),
            "layers.0.experts.down_proj_scales": torch.full((2, 32, 2), 127, dtype=torch.uint8),
        },
        {"quant_method": "mxfp4"},
    ),
    "packed": (
        {
            f"{MODULE}.weight_packed": random(torch.int32, 32, 8),
            f"{MODULE}.weight_scale": torch.ones(32, 2),
            f"{MODULE}.weight_zero_point": random(torch.int32, 4, 2),
            f"{MODULE}.weight_shape": torch.tensor([32, 64]),
        },
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        },
    ),
    "torchao": (
        {
            f"{MODULE}._weight_qdata": random(torch.int8, 32, 64),
            f"{MODULE}._weight_scale": torch.ones(32, 1),
        },
        {"quant_method": "torchao"},
    ),
}
AO = {NAME: json.dumps({"_type": "Int8Tensor", "_data": {"block_size": [1, 64]}})}


def gguf_bytes():
    """A GGUF file with one tensor in float32 and one in Q8_0."""
    text = lambda value: struct.pack("<Q", len(value)) + value  # noqa: E731
    tokens = struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc")
    values = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    values += text(b"tokenizer.ggml.tokens") + tokens
    described = text(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 4, 0, 0)
    described += text(b"blk.0.ffn_up.weight") + struct.pack("<IQQIQ", 2, 32, 4, 8, 512)
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 2) + values + described
    header += bytes(-len(header) % 32)
    blocks = b"".join(np.float16(0.1).tobytes() + bytes(range(32)) for _ in range(4))
    return header + np.ones(128, np.float32).tobytes() + blocks


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A checkpoint of each kind, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("quantised")
    for name, (tensors, config) in CHECKPOINTS.items():
        write(folder / name, tensors, config, metadata=AO if name == "torchao" else None)
    (folder / "gguf").mkdir()
    (folder / "gguf/model.gguf").write_bytes(gguf_bytes())
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_undamaged_checkpoints_are_read_without_problems(runs, name):
    assert read_all(runs / name) == []


def test_the_undamaged_gguf_file_is_read_without_problems(runs):
    pytest.importorskip("gguf")
    assert read_all(runs / "gguf") == []


@pytest.mark.slow
@fuzz
@given(data=st.data())
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_bytes_of_quantised_weights(runs, data, name):
    content = data.draw(damaged_bytes((runs / name / MODEL).read_bytes()))
    read_all(damaged_copy(runs, name, MODEL, content))


@pytest.mark.slow
@fuzz
@given(data=st.data())
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_headers_of_quantised_weights(runs, data, name):
    content = (runs / name / MODEL).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = encoded(data.draw(damaged_json(json.loads(content[8 : 8 + length]))))
    content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    read_all(damaged_copy(runs, name, MODEL, content))


@pytest.mark.slow
@fuzz
@given(data=st.data())
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_configs_of_quantised_weights(runs, data, name):
    seed = json.loads((runs / name / CONFIG).read_text())
    read_all(damaged_copy(runs, name, CONFIG, encoded(data.draw(damaged_json(seed)))))


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_damaged_states_of_bitsandbytes(runs, data):
    stored = bitsandbytes_keys()
    text = encoded(data.draw(damaged_json(STATE)))
    key = f"{NAME}.quant_state.bitsandbytes__nf4"
    stored[key] = torch.tensor(list(text) or [0], dtype=torch.uint8)
    read_all(write(runs / "state", stored, CHECKPOINTS["nf4"][1]))


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_damaged_descriptions_of_torchao(runs, data):
    metadata = {NAME: encoded(data.draw(damaged_json(json.loads(AO[NAME])))).decode()}
    read_all(write(runs / "described", *CHECKPOINTS["torchao"], metadata=metadata))


@pytest.mark.slow
@fuzz
@given(data=st.data())
def test_damaged_bytes_of_gguf(runs, data):
    content = data.draw(damaged_bytes(gguf_bytes()))
    read_all(damaged_copy(runs, "gguf", "model.gguf", content))
