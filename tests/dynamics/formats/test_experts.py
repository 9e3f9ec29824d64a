"""Experts and convolutions in checkpoints are matrices, and the account of a model."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

import dynamics as dy
from dynamics.formats.storage import tensors
from dynamics.runs.stacks import parts_of

EXPERTS = 3
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
}  # fmt: skip


def model_of(family):
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")
    return made(made.config_class(**SIZES))


def live_matrices(model):
    """From the live tensors by plain indexing, as the module computes with them."""
    found = {}
    for name, tensor in model.named_parameters():
        parts = parts_of(name, tuple(tensor.shape), model.config.to_dict())
        if not isinstance(parts, str):
            found |= {part.name: part.of(tensor.detach().numpy()) for part in parts}
    return found


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "GraniteMoe"])
@pytest.mark.parametrize("layout", ["save_pretrained", "transposed strides"])
def test_experts_of_files_are_the_matrices_of_the_live_model(family, layout, tmp_path):
    model = model_of(family)
    expected = live_matrices(model)
    if layout == "save_pretrained":
        model.save_pretrained(tmp_path)
    else:
        # Not contiguous in the file: no part of it is a range of bytes.
        state = {
            name: each.transpose(1, 2).contiguous().transpose(1, 2) if each.ndim == 3 else each
            for name, each in model.state_dict().items()
        }
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(model.config.to_json_string())
    run = dy.open_run(tmp_path, split_fused=False)
    experts = {name: each for name, each in run.matrices.items() if each.expert is not None}
    assert len(experts) == 3 * EXPERTS
    assert {each.expert for each in experts.values()} == set(range(EXPERTS))
    for name in experts:
        assert np.array_equal(run.read(name, 0, "weight").values, expected[name])
        assert run.read(name, 0, "weight").shape == (experts[name].rows, experts[name].cols)


def test_an_expert_is_read_alone_from_its_own_bytes(tmp_path, monkeypatch):
    stack = torch.arange(3 * 4 * 6.0).reshape(3, 4, 6)
    save_file({"mlp.experts.down_proj": stack}, tmp_path / "model.safetensors")
    run = dy.open_run(tmp_path)
    read, real = [], tensors.read_range
    monkeypatch.setattr(tensors, "read_range", lambda path, offset, length: (
        read.append(length), real(path, offset, length))[1])  # fmt: skip
    values = run.read("mlp.experts.1.down_proj.weight", 0, "weight").values
    assert np.array_equal(values, stack[1])
    assert read == [4 * 6 * 4]


def test_what_lies_in_shards_is_read_once_for_all_experts(tmp_path):
    stack = torch.arange(3 * 4 * 6.0).reshape(3, 4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"mlp.experts.down_proj": stack}}, checkpoint_id=tmp_path / "step-1")
    run = dy.open_run(tmp_path)
    for expert in range(3):
        values = run.read(f"mlp.experts.{expert}.down_proj.weight", 1, "weight").values
        assert np.array_equal(values, stack[expert])


def test_a_convolution_is_one_matrix_and_a_kernel_of_one_pixel_a_plain_one(tmp_path):
    kernels = {
        "stem.conv.weight": torch.randn(8, 3, 5, 5),
        "head.conv.weight": torch.randn(4, 8, 1),
    }
    save_file(kernels, tmp_path / "model.safetensors")
    run = dy.open_run(tmp_path)
    assert {n: (each.rows, each.cols) for n, each in run.matrices.items()} == {
        "stem.conv.weight": (8, 75),
        "head.conv.weight": (4, 8),
    }
    analysis = dy.analyze(run, metrics=["spectral_norm"], kinds=["weight"])
    for name, kernel in kernels.items():
        norm = np.linalg.norm(kernel.double().reshape(kernel.shape[0], -1).numpy(), 2)
        found = analysis["spectral_norm"].sel(matrix=name).item()
        assert found == pytest.approx(norm, rel=1e-12)


# The account -------------------------------------------------------------------------------------


@pytest.fixture
def with_a_part_left_out(tmp_path):
    tensors = {
        "up_proj.weight": torch.randn(30, 20),
        "norm.weight": torch.ones(20),
        "heads": torch.randn(4, 10, 10),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_every_tensor_is_measured_or_left_out_for_a_reason(with_a_part_left_out):
    run = dy.open_run(with_a_part_left_out)
    stored = load_file(with_a_part_left_out / "model.safetensors")
    assert set(run.account.measured) | {each.name for each in run.account.left_out} == set(stored)
    assert run.account.numbers == 600
    assert run.account.share == 600 / 1020
    assert run.account.unchosen_share() == pytest.approx(400 / 1000)


def test_results_and_comparisons_carry_what_is_left_out(with_a_part_left_out):
    with pytest.warns(dy.LeftOutWarning, match=r"40\.0 % of the numbers .* \(heads\)"):
        result = dy.analyze(with_a_part_left_out, metrics=["effective_rank"])
    left_out = json.loads(result.attrs["left_out"])
    assert left_out["norm.weight"] == "vectors (norms, biases)"
    assert "neither experts nor convolutions" in left_out["heads"]
    both = dy.compare({"a": result, "b": result})
    assert json.loads(both.attrs["left_out"]) == {"a": left_out, "b": left_out}
    assert dy.select_run(both, "a").attrs["left_out"] == result.attrs["left_out"]
