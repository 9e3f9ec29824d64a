"""Circuits of quantised weights: their floor is that of the codes."""

import numpy as np
import pytest

import dynamics as dy
from tests.dynamics.formats.quantised.checking import matrix, write

torch = pytest.importorskip("torch")

HEADS, WIDTH = 4, 128
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_size": WIDTH,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64]}


def quantised(weight):
    """(Codes, scales, the numbers that they stand for), in blocks of 64 x 64."""
    blocks = torch.tensor(weight).reshape(2, 64, 2, 64)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    back = codes.double() * scale.double()[:, None, :, None]
    return codes.reshape(WIDTH, WIDTH), scale, back.reshape(WIDTH, WIDTH).numpy()


@pytest.fixture
def run(tmp_path):
    """Two steps of an attention in FP8, and the original weights of each."""
    originals = []
    for step in (1, 2):
        stored = {}
        originals.append({})
        for seed, name in enumerate("qkvo"):
            weight = matrix(shape=(WIDTH, WIDTH), seed=seed) + step * 0.1 * matrix(
                shape=(WIDTH, WIDTH), seed=seed + 10
            )
            key = f"model.layers.0.self_attn.{name}_proj.weight"
            stored[key], stored[f"{key}_scale_inv"], _ = quantised(weight)
            originals[-1][name] = weight.astype(np.float64)
        write(tmp_path / f"checkpoint-{step}", stored, FP8, **CONFIG)
    return tmp_path, originals


def head_of(component, weights):
    """The circuit of head 1."""
    rows = slice(WIDTH // HEADS, 2 * WIDTH // HEADS)
    if component == "ov_circuit":
        return weights["o"][:, rows] @ weights["v"][rows]
    return weights["q"][rows].T @ weights["k"][rows]


@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit"])
def test_the_floor_covers_what_the_codes_change(run, component):
    path, originals = run
    measured = dy.analyze(path, kinds=["weight", "update"], components=[component])
    name = f"model.layers.0.self_attn.{component}.1"
    opened = dy.open_run(path)
    read = [
        {
            each: opened.read(f"model.layers.0.self_attn.{each}_proj.weight", step, "weight").values
            for each in "qkvo"
        }
        for step in (1, 2)
    ]
    errors = [
        head_of(component, {key: each.astype(np.float64) for key, each in now.items()})
        - head_of(component, original)
        for now, original in zip(read, originals, strict=True)
    ]
    floors = measured["noise_floor"].sel(matrix=name)
    for step, error in ((1, errors[0]), (2, errors[1])):
        ratio = floors.sel(kind="weight", step=step).item() / np.linalg.norm(error, 2)
        assert 1 < ratio < 3.5
    ratio = floors.sel(kind="update", step=2).item() / np.linalg.norm(errors[1] - errors[0], 2)
    assert 1 < ratio < 4.5


def test_the_circuit_of_pico_has_the_floor_of_the_codes(run):
    path, _ = run
    floors = dy.analyze(path, kinds=["weight"], components=["ov_circuit", "pico_ov_circuit"])
    floors = floors["noise_floor"].sel(step=1, kind="weight")
    one = floors.sel(matrix="model.layers.0.self_attn.ov_circuit.1").item()
    whole = floors.sel(matrix="model.layers.0.self_attn.pico_ov_circuit").item()
    assert one < whole < 10 * one
