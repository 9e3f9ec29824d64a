"""Circuits of families beside the decoders, and coordinates that tell their matrices apart."""

import numpy as np
import pytest
import torch
import transformers

import dynamics as dy

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4}  # fmt: skip
SIDES = {
    f"{side}_{what}": number
    for side in ("encoder", "decoder")
    for what, number in (("layers", 1), ("ffn_dim", 24))
}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
WHISPER = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CLIP = {"vocab_size": 40, "image_size": 8, "patch_size": 4, "projection_dim": 8}

# class -> (config, heads of each attention)
FAMILIES = {
    "BertForMaskedLM": ({"vocab_size": 40, **SMALL}, [4, 4]),
    "ViTForImageClassification": ({"image_size": 8, "patch_size": 4, **SMALL}, [4, 4]),
    "WhisperForConditionalGeneration": (
        {"vocab_size": 40, "d_model": 16, **SIDES, **HEADS, **WHISPER}, [4, 2, 2]
    ),
    "BartForConditionalGeneration": (
        {"vocab_size": 40, "d_model": 16, **SIDES, **HEADS}, [4, 2, 2]
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4},
        [4, 4, 4],
    ),
    "CLIPModel": (
        {
            "text_config": {**SMALL, **CLIP, "num_attention_heads": 2},
            "vision_config": {**SMALL, **CLIP, "num_hidden_layers": 1},
        },
        [2, 2, 4],
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def saved(request, tmp_path):
    torch.manual_seed(0)
    made = getattr(transformers, request.param)
    model = made(made.config_class(**FAMILIES[request.param][0]))
    model.save_pretrained(tmp_path)
    return FAMILIES[request.param][1], tmp_path


@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit"])
def test_every_attention_has_the_circuits_of_its_own_heads(component, saved):
    heads, path = saved
    found = dy.analyze(path, components=[component], kinds=["weight"], metrics=["spectral_norm"])
    assert found.sizes["matrix"] == sum(heads)
    # One of them by hand, from the projections as the files name them.
    run, name = dy.open_run(path), str(found["matrix"].values[-1])
    where = name.rpartition(f".{component}.")[0]
    wanted = ("q_proj", "k_proj") if component == "qk_circuit" else ("v_proj", "o_proj")
    parts = {
        info.module: run.read(each, 0, "weight").values.astype(float)
        for each, info in run.matrices.items()
        if each.startswith(f"{where}.") and info.module in wanted
    }
    own = sum(each.startswith(f"{where}.") for each in found["matrix"].values)
    assert own in heads
    rows = slice(16 - 16 // own, None)  # the last head
    first, second = (parts[each] for each in wanted)
    product = (
        first[rows].T @ second[rows]
        if component == "qk_circuit"
        else (first[rows].T @ second[:, rows].T)
    )
    assert found["spectral_norm"].values[0, 0, -1] == pytest.approx(np.linalg.norm(product, 2))


def test_no_two_matrices_have_the_same_coordinates(saved):
    _, path = saved
    found = dy.analyze(path, kinds=["weight"], metrics=["stable_rank"]).drop_vars(["rows", "cols"])
    names = [
        name for name, each in found.coords.items() if each.dims == ("matrix",) and name != "matrix"
    ]
    rows = list(zip(*(found[name].values.tolist() for name in names), strict=True))
    assert len(set(rows)) == len(rows)


def test_encoder_and_decoder_self_and_cross_are_coordinates(tmp_path):
    made = transformers.T5ForConditionalGeneration
    made(made.config_class(**FAMILIES["T5ForConditionalGeneration"][0])).save_pretrained(tmp_path)
    found = dy.analyze(tmp_path, kinds=["weight"], metrics=["stable_rank"])
    queries = found.sel(matrix=found["module"] == "q_proj")
    assert sorted(zip(queries["stack"].values, queries["attention"].values, strict=True)) == [
        ("decoder", "cross"),
        ("decoder", "self"),
        ("encoder", "self"),
    ]
    (shared,) = found.sel(matrix=found["module"] == "embed_tokens")["stack"].values
    assert shared == ""
