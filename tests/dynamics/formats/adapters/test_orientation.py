"""One adapter on layers of both orientations: each is added as its own layer stores its weight."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.formats.shared.adapters.orientation import Orientations

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.dynamics.formats.adapters.merging import (  # noqa: E402
    TOLERANCE,
    check_weights,
    deviation,
    merged_weights,
    saved_run,
)

PROJECTION = "transformer.h.0.attn.c_proj.weight"


def gpt2(**sizes):
    torch.manual_seed(0)
    config = {
        "vocab_size": 48, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2,
        "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | sizes))


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3"])
@pytest.mark.parametrize(
    "targets",
    [
        ["attn.c_proj"],
        ["attn.c_proj", "lm_head"],
        ["c_attn", "c_proj", "c_fc", "lm_head"],
        ["attn.c_proj", "wte", "lm_head"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("vocabulary", [48, 16])  # a square head, too
def test_conv1d_linear_and_embedding_in_one_adapter(tmp_path, method, targets, vocabulary):
    if method != "lora" and "wte" in targets and method != "dora":
        pytest.skip("PEFT has no such layer")
    config = {
        "lora": lambda: peft.LoraConfig(r=3, target_modules=targets),
        "dora": lambda: peft.LoraConfig(r=3, target_modules=targets, use_dora=True),
        "vera": lambda: peft.VeraConfig(r=3, target_modules=targets),
        "ia3": lambda: peft.IA3Config(
            target_modules=targets, feedforward_modules=["c_fc"] if "c_fc" in targets else []
        ),
    }[method]()
    model = saved_run(tmp_path, gpt2(vocab_size=vocabulary), config)
    check_weights(tmp_path, merged_weights(model))


@pytest.mark.parametrize("lm_head", [True, False])
def test_without_a_config_a_square_layer_among_both_kinds_is_left_out_by_name(tmp_path, lm_head):
    model = gpt2(n_inner=16)  # all layers but c_attn and the head are square
    targets = ["attn.c_proj", *(["lm_head"] if lm_head else [])]
    model = saved_run(tmp_path, model, peft.LoraConfig(r=3, target_modules=targets))
    (tmp_path / "base/config.json").unlink()
    expected = merged_weights(model)
    run = dy.open_run(tmp_path, split_fused=False)
    if lm_head:
        (left_out,) = [each for each in run.account.left_out if not each.is_vector]
        assert left_out.name == PROJECTION
        assert "(in, out) or (out, in), which nothing tells" in left_out.reason
        assert PROJECTION not in run.matrices
        found = run.read("lm_head.weight", 3, "weight").values
        assert deviation(found, expected["lm_head.weight"]) < TOLERANCE
    else:  # PEFT wrote what it did for the only kind of layer
        found = run.read(PROJECTION, 3, "weight").values
        assert deviation(found, expected[PROJECTION]) < TOLERANCE


def test_a_flag_that_contradicts_all_shapes_is_not_believed(tiny_llama, tmp_path):
    model = saved_run(
        tmp_path, tiny_llama(), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
    )
    file = tmp_path / "checkpoint-3/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": True}))
    check_weights(tmp_path, merged_weights(model))


def test_what_nothing_tells_is_not_guessed():
    square = ("h.0.c_proj", (4, 4), (4, 4))
    linear = ("lm_head", (8, 4), (8, 4))
    conv1d = ("h.0.c_fc", (8, 4), (4, 8))
    unknown = Orientations.of([square, linear, conv1d], {}, {})
    assert unknown.is_in_out(*square) is None
    assert unknown.is_in_out(*linear) is False
    assert unknown.is_in_out(*conv1d) is True
    assert Orientations.of([square], {"fan_in_fan_out": True}, {}).is_in_out(*square) is True
    same_name = ("h.0.mlp.c_proj", (4, 8), (8, 4))
    assert Orientations.of([square, same_name], {}, {}).is_in_out(*square) is True
    np.testing.assert_equal(Orientations.of([square], {}, {"model_type": "x"}).family, "x")
