"""Adapters on a quantised base: W has the errors of the codes, an update of W has none of them."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import MissingError
from tests.dynamics.formats.quantised.checking import matrix, write

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file

NAME = "model.layers.0.self_attn.q_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [64, 64]}
RANK = 4


@pytest.fixture
def run(tmp_path):
    """Two PEFT checkpoints on one base in FP8, and the adapters' products."""
    blocks = torch.tensor(matrix(shape=(128, 128))).reshape(2, 64, 2, 64)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(128, 128)
    write(tmp_path / "base", {NAME: codes, f"{NAME}_scale_inv": scale}, FP8, dtype="bfloat16")
    products = []
    for step in (1, 2):
        rng = np.random.default_rng(step)
        a, b = rng.standard_normal((RANK, 128)), 1e-3 * rng.standard_normal((128, RANK))
        factors = {"lora_A": a, "lora_B": b}
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        prefix = "base_model.model." + NAME.removesuffix(".weight")
        tensors = {f"{prefix}.{key}.weight": torch.tensor(each) for key, each in factors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        products.append(2 * b @ a)
    base = codes.double() * scale.double().repeat_interleave(64, 0).repeat_interleave(64, 1)
    return tmp_path, base.numpy(), products


def test_the_weight_is_the_dequantised_base_and_the_adapter(run):
    path, base, products = run
    opened = dy.open_run(path)
    for step in (1, 2):
        weight = opened.read(NAME, step, "weight")
        np.testing.assert_allclose(weight.values, base + products[step - 1], rtol=0, atol=1e-8)
    floors = dy.analyze(path)["noise_floor"].sel(matrix=NAME, step=2)
    assert floors.sel(kind="weight").item() == floors.sel(kind="base").item()


def test_the_errors_of_the_base_cancel_in_an_update(run):
    path, _, _ = run
    measured = dy.analyze(path).sel(matrix=NAME, step=2)
    assert measured["numerical_rank"].sel(kind="update").item() == 2 * RANK
    floor = measured["noise_floor"]
    # What remains is the rounding of the model's own dtype, bfloat16, as above a base in bfloat16.
    assert floor.sel(kind="update").item() < floor.sel(kind="base").item() / 5


def test_dora_has_the_errors_of_its_base(run):
    path, base, products = run
    for step in (1, 2):
        folder = path / f"checkpoint-{step}"
        tensors = load_file(folder / "adapter_model.safetensors")
        norms = torch.tensor(np.linalg.norm(base + products[step - 1], axis=1))
        prefix = "base_model.model." + NAME.removesuffix(".weight")
        tensors[f"{prefix}.lora_magnitude_vector"] = 1.01 * norms
        save_file(tensors, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    weight = dy.open_run(path).read(NAME, 2, "weight")
    np.testing.assert_allclose(weight.values, 1.01 * (base + products[1]), rtol=0, atol=1e-6)
    floors = dy.analyze(path)["noise_floor"].sel(matrix=NAME, step=2)
    assert floors.sel(kind="weight").item() == floors.sel(kind="base").item()


def test_a_base_that_is_not_dequantised_is_named(run):
    path, _, _ = run
    config = {"quantization_config": {"quant_method": "quark"}}
    (path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(MissingError, match="quantised by quark, not dequantised"):
        dy.analyze(path)
