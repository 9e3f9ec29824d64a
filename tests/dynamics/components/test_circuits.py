"""The matrices of the circuits: closed forms, dense products, and what real attention computes."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.runs.run import Factored
from dynamics.spectra.spectrum import spectrum

OV = "model.layers.{}.self_attn.ov_circuit.{}"
QK = "model.layers.{}.self_attn.qk_circuit.{}"


def test_heads_of_one_dimension_are_outer_products(write_run, random_attention, circuits):
    config, tensors = random_attention(3, 1, 1, 5)
    run = write_run(config, {1: tensors})
    q, k, v, o = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo")
    for head in range(3):
        s = spectrum(circuits(run, "ov_circuit")[OV.format(0, head)](1, "weight")).s
        np.testing.assert_allclose(s[0], np.linalg.norm(o[:, head]) * np.linalg.norm(v))
        np.testing.assert_array_equal(s[1:], 0)
        s = spectrum(circuits(run, "qk_circuit")[QK.format(0, head)](1, "weight")).s
        np.testing.assert_allclose(s[0], np.linalg.norm(q[head]) * np.linalg.norm(k))


def test_orthogonal_projections_give_a_partial_isometry(write_run, circuits):
    # W_V takes coordinates 2g, 2g+1 out of the stream; W_O writes head h to coordinates 2h, 2h+1.
    prefix = "model.layers.0.self_attn"
    tensors = {f"{prefix}.v_proj.weight": np.eye(4, 8), f"{prefix}.o_proj.weight": np.eye(8)}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    run = write_run(config, {1: tensors})
    for head in range(4):
        expected = np.zeros((8, 8))
        expected[[2 * head, 2 * head + 1], [2 * (head // 2), 2 * (head // 2) + 1]] = 1
        matrix = circuits(run, "ov_circuit")[OV.format(0, head)](1, "weight")
        np.testing.assert_array_equal(matrix.product(), expected)


@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_singular_values_are_those_of_the_dense_product(
    kv_heads, component, tiny_llama, dense_circuit, tmp_path
):
    model = tiny_llama(num_key_value_heads=kv_heads)
    model.save_pretrained(tmp_path / "checkpoint-1")
    measured = dy.analyze(tmp_path, components=[component], kinds=["weight"])
    tensors = {name: each.detach().numpy() for name, each in model.state_dict().items()}
    config = model.config.to_dict() | {"head_dim": 4}
    assert measured.sizes["matrix"] == 2 * 4
    for layer in range(2):
        for head in range(4):
            name = f"model.layers.{layer}.self_attn.{component}.{head}"
            dense = dense_circuit(tensors, config, component, head, layer)
            expected = np.linalg.svd(dense, compute_uv=False)
            found = measured["singular_value"].sel(matrix=name, kind="weight", step=1).values
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * expected[0])
            assert found.shape == (16,)


@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit"])
def test_the_rank_is_that_of_a_head(component, write_run, random_attention):
    config, tensors = random_attention(4, 2, 3, 12)
    measured = dy.analyze(write_run(config, {1: tensors}), components=[component])
    measured = measured.sel(kind="weight")
    assert (measured["rank_bound"] == 3).all()
    assert (measured["numerical_rank"] == 3).all()
    assert (measured["singular_value"].isel(index=slice(3, None)) == 0).all()
    assert (measured["effective_rank"] <= 3).all()


def test_a_head_wider_than_the_stream_is_bounded_by_the_stream(write_run, random_attention):
    config, tensors = random_attention(2, 1, 9, 6)
    measured = dy.analyze(write_run(config, {1: tensors}), components=["ov_circuit"])
    assert (measured["rank_bound"].sel(kind="weight") == 6).all()
    assert (measured["numerical_rank"].sel(kind="weight") == 6).all()


@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit"])
def test_a_circuit_is_never_multiplied_out(component, write_run, random_attention, circuits):
    config, tensors = random_attention(4, 2, 3, 12, dtype=np.float32)
    for read in circuits(write_run(config, {1: tensors}), component).values():
        matrix = read(1, "weight")
        assert isinstance(matrix, Factored)
        assert (matrix.left.shape, matrix.right.shape) == ((12, 3), (3, 12))
        assert (matrix.scale, matrix.dtype) == (1.0, "float32")


# What real attention computes -------------------------------------------------------------------


@pytest.fixture
def attention(tiny_llama):
    """(LlamaAttention of layer 1, x (1, 6, 16), its rotary embedding): random weights, float64."""
    torch = pytest.importorskip("torch")
    model = tiny_llama(attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    positions = model.model.rotary_emb(x, torch.arange(6)[None])
    return model, model.model.layers[1].self_attn, x, positions


def _saved(model, directory):
    model.save_pretrained(directory / "checkpoint-1")
    return dy.open_run(directory)


@pytest.mark.parametrize("head", range(4))
def test_a_lone_head_writes_its_pattern_times_its_ov_circuit(head, attention, circuits, tmp_path):
    import torch

    model, module, x, positions = attention
    with torch.no_grad():
        silenced = [i for i in range(16) if i // 4 != head]
        module.o_proj.weight[:, silenced] = 0
        written, patterns = module(x, position_embeddings=positions, attention_mask=None)
    ov = circuits(_saved(model, tmp_path), "ov_circuit")[OV.format(1, head)](1, "weight").product()
    expected = patterns[0, head].numpy() @ x[0].numpy() @ ov.T
    np.testing.assert_allclose(written[0].numpy(), expected, rtol=1e-12, atol=1e-12)
    assert np.abs(expected).max() > 0.1


def test_all_heads_together_write_the_sum_of_their_circuits(attention, circuits, tmp_path):
    import torch

    model, module, x, positions = attention
    with torch.no_grad():
        written, patterns = module(x, position_embeddings=positions, attention_mask=None)
    readers = circuits(_saved(model, tmp_path), "ov_circuit")
    expected = sum(
        patterns[0, head].numpy()
        @ x[0].numpy()
        @ readers[OV.format(1, head)](1, "weight").product().T
        for head in range(4)
    )
    np.testing.assert_allclose(written[0].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_the_qk_circuit_scores_positions_at_distance_zero(attention, circuits, tmp_path):
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    model, module, x, positions = attention
    with torch.no_grad():
        queries = module.q_proj(x).view(1, 6, 4, 4).transpose(1, 2)
        keys = module.k_proj(x).view(1, 6, 2, 4).transpose(1, 2)
        rotated, keys = apply_rotary_pos_emb(queries, keys, *positions)
        scores = torch.einsum("bhsd,bhsd->hs", rotated, repeat_kv(keys, 2)).numpy()
    readers = circuits(_saved(model, tmp_path), "qk_circuit")
    for head in range(4):
        qk = readers[QK.format(1, head)](1, "weight").product()
        expected = np.einsum("si,ij,sj->s", x[0].numpy(), qk, x[0].numpy())
        np.testing.assert_allclose(scores[head], expected, rtol=1e-5)  # rotary tables are float32


# Noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit"])
def test_the_noise_floor_covers_what_rounding_does_and_little_more(
    component, dtype, random_attention, dense_circuit, circuits, tmp_path
):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    config, exact = random_attention(4, 2, 16, 64, dtype=np.float32)
    stored = {name: torch.tensor(each).to(getattr(torch, dtype)) for name, each in exact.items()}
    (tmp_path / "checkpoint-1").mkdir()
    save_file(stored, tmp_path / "checkpoint-1/model.safetensors")
    (tmp_path / "checkpoint-1/config.json").write_text(json.dumps(config))
    rounded = {name: each.float().numpy() for name, each in stored.items()}
    for head, read in enumerate(circuits(dy.open_run(tmp_path), component).values()):
        error = dense_circuit(rounded, config, component, head) - dense_circuit(
            exact, config, component, head
        )
        norm, floor = np.linalg.norm(error, 2), spectrum(read(1, "weight")).noise_floor
        assert norm < floor < 4 * norm


@pytest.mark.parametrize("coarse", ["v_proj", "o_proj"])
def test_factors_of_two_dtypes_have_the_noise_of_the_coarser(
    coarse, write_run, random_attention, circuits
):
    config, tensors = random_attention(2, 1, 3, 8, dtype=np.float32)
    mixed = {
        name: each.astype(np.float16) if coarse in name else each for name, each in tensors.items()
    }
    for read in circuits(write_run(config, {1: mixed, 2: mixed}), "ov_circuit").values():
        assert read(1, "weight").dtype == read(2, "update").dtype == "float16"
