import pytest

from dynamics.errors import DynamicsError, MissingError
from dynamics.runs.attention_config import Architecture, check_projections, read_architecture

FALCON = {
    "model_type": "falcon", "num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 32,
}  # fmt: skip
LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


def read(config):
    return read_architecture({"config": config}, "runs/a")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, Architecture(8, 2, 8, 64)),
        (LLAMA | {"head_dim": 32}, Architecture(8, 2, 32, 64)),
        (LLAMA | {"head_dim": None, "num_key_value_heads": None}, Architecture(8, 8, 8, 64)),
        ({"num_attention_heads": 4, "hidden_size": 32}, Architecture(4, 4, 8, 32)),
        ({"n_head": 12, "n_embd": 768}, Architecture(12, 12, 64, 768)),
        ({"n_heads": 4, "n_kv_heads": 1, "d_model": 32}, Architecture(4, 1, 8, 32)),
        (
            {"d_model": 96, "attention_n_heads": 12, "attention_n_kv_heads": 4},
            Architecture(12, 4, 8, 96),
        ),
        (
            {"model": {"d_model": 96, "attention_n_heads": 12, "attention_n_kv_heads": None}},
            Architecture(12, 12, 8, 96),
        ),
        ({"vision_config": {"hidden_size": 9}, "text_config": LLAMA}, Architecture(8, 2, 8, 64)),
        ({"dim": 64, "n_heads": 8, "n_kv_heads": 2}, Architecture(8, 2, 8, 64)),
        ({"num_heads": 4, "hidden_size": 32}, Architecture(4, 4, 8, 32)),
        ({"num_heads": 4, "d_model": 32, "d_kv": 16}, Architecture(4, 4, 16, 32)),
        # One key-value head for all, whatever the config says of them beside.
        (FALCON, Architecture(4, 1, 8, 32)),
        (FALCON | {"multi_query": False}, Architecture(4, 4, 8, 32)),
        (FALCON | {"new_decoder_architecture": True}, Architecture(4, 2, 8, 32)),
        ({"model_type": "gpt_bigcode", "n_head": 4, "n_embd": 32}, Architecture(4, 1, 8, 32)),
    ],
)
def test_every_spelling_gives_the_same_four_numbers(config, expected):
    assert read(config) == expected


@pytest.mark.parametrize(
    "name", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "GemmaConfig"]
)
def test_the_projections_of_real_models_have_the_stated_shapes(name):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = getattr(transformers, name)(
        vocab_size=16, hidden_size=24, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {
        each: tuple(parameter.shape)
        for each, parameter in model.named_parameters()
        if each.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"))
    }
    assert len(shapes) == 4
    check_projections(read(config.to_dict()), shapes, "runs/a")


def test_query_heads_share_key_value_heads_in_order():
    assert [Architecture(6, 3, 1, 1).kv_head(head) for head in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [Architecture(3, 3, 1, 1).kv_head(head) for head in range(3)] == [0, 1, 2]
    assert [Architecture(3, 1, 1, 1).kv_head(head) for head in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("attrs", [{}, {"config": {}}, {"config": None}, {"config": [1]}])
def test_a_run_without_config_says_what_to_do(attrs):
    with pytest.raises(MissingError, match=r"^runs/a has no model config.*config\.json"):
        read_architecture(attrs, "runs/a")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 8}, "none of num_attention_heads, attention_n_heads"),
        ({"num_attention_heads": 8}, "none of hidden_size, d_model"),
        (LLAMA | {"num_key_value_heads": 3}, "8 heads cannot share 3 key-value heads"),
        (LLAMA | {"num_key_value_heads": 16}, "8 heads cannot share 16 key-value heads"),
        (LLAMA | {"hidden_size": 65}, "hidden_size 65 is not a multiple of 8 heads"),
        (LLAMA | {"num_attention_heads": [8, 4]}, r"num_heads is \[8, 4\], expected a positive"),
        (LLAMA | {"num_attention_heads": "8"}, "num_heads is '8', expected a positive"),
        (LLAMA | {"num_attention_heads": 0}, "num_heads is 0, expected a positive"),
        (LLAMA | {"head_dim": True}, "head_dim is True, expected a positive"),
        (LLAMA | {"head_dim": 2.5}, "head_dim is 2.5, expected a positive"),
        (LLAMA | {"hidden_size": -64}, "hidden_size is -64, expected a positive"),
    ],
)
def test_an_impossible_config_is_one_clear_line(config, message):
    with pytest.raises(DynamicsError, match=message) as caught:
        read(config)
    assert "runs/a" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_contradict_the_config_are_named():
    shapes = {"model.layers.0.self_attn.v_proj.weight": (64, 64)}
    with pytest.raises(DynamicsError) as caught:
        check_projections(read(LLAMA), shapes, "runs/a")
    assert str(caught.value) == (
        "runs/a has model.layers.0.self_attn.v_proj.weight in shape (64, 64), but its model "
        "config says (16, 64) (8 heads, 2 key-value heads, head_dim 8, hidden_size 64); "
        "it is not this model's config."
    )
