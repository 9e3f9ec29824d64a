"""The command line says how much of a model is measured."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dynamics as dy


@pytest.fixture
def model(tmp_path):
    tensors = {
        "up_proj.weight": torch.randn(30, 20),
        "norm.weight": torch.ones(20),
        "heads": torch.randn(4, 10, 10),
    }
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model/model.safetensors")
    return tmp_path / "model"


def test_analyze_and_inspect_say_what_is_measured_and_warn_of_the_rest(model, command, tmp_path):
    code, out, err = command("analyze", model, "-o", tmp_path / "result.zarr")
    assert code == 0
    line = "Measured 1 of 3 tensors, 58.8 % of 1020 numbers; left out: 1 tensors of 3 dimensions"
    assert line in out
    assert err.count("40.0 % of the numbers") == 1
    assert "norm.weight" in json.loads(dy.load(tmp_path / "result.zarr").attrs["left_out"])
    code, out, err = command("inspect", model)
    assert code == 0
    assert "1 of 3 tensors" in out
    assert err.count("40.0 % of the numbers") == 1


def test_compare_says_it_of_each_run(model, command, tmp_path):
    code, out, err = command("compare", f"a={model}", f"b={model}", "-o", tmp_path / "both.zarr")
    assert code == 0
    assert "a: Measured 1 of 3 tensors" in out
    assert "b: Measured 1 of 3 tensors" in out
    assert err.count("40.0 % of the numbers") == 2
