"""Names of real model families map to the same layers and modules."""

import pytest
import torch
import transformers
from safetensors import safe_open

from dynamics.runs.attention_config import tied_aliases
from dynamics.runs.parameter_names import (
    MODULES,
    attention_path,
    clean_name,
    layer_of,
    matches,
    module_of,
)

# Families ----------------------------------------------------------------------------------------

HUGGING_FACE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False}
BERT = {key: value for key, value in HUGGING_FACE.items() if key != "num_key_value_heads"}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}  # fmt: skip

APART, TOGETHER = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}
GATED, PLAIN = {"gate_proj", "up_proj", "down_proj"}, {"up_proj", "down_proj"}
ENDS, TIED, PLACES = {"embed_tokens", "lm_head"}, {"embed_tokens"}, {"embed_positions"}

# class -> (config, the modules of each layer, those outside the stack)
FAMILIES = {
    **{
        f"{name}ForCausalLM": (HUGGING_FACE, APART | GATED, ENDS)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Olmo", "Olmo2",
                     "StableLm")
    },
    "PhiForCausalLM": (HUGGING_FACE, APART | PLAIN, ENDS),
    "Phi3ForCausalLM": (HUGGING_FACE, TOGETHER | {"gate_up_proj", "down_proj"}, ENDS),
    "GlmForCausalLM": (HUGGING_FACE, APART | {"gate_up_proj", "down_proj"}, ENDS),
    "Starcoder2ForCausalLM": (HUGGING_FACE, APART | PLAIN, ENDS),
    "GPT2LMHeadModel": (GPT, TOGETHER | PLAIN, ENDS | PLACES),
    "GPTBigCodeForCausalLM": (GPT, TOGETHER | PLAIN, ENDS | PLACES),
    "GPTJForCausalLM": (GPT | {"rotary_dim": 2}, APART | PLAIN, ENDS),
    "CodeGenForCausalLM": (GPT | {"rotary_dim": 2}, TOGETHER | PLAIN, ENDS),
    "GPTNeoForCausalLM": (
        {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4,
         "attention_types": [[["global"], 2]], "tie_word_embeddings": False},
        APART | PLAIN,
        ENDS | PLACES,
    ),
    "GPTNeoXForCausalLM": (BERT, TOGETHER | PLAIN, ENDS),
    "PersimmonForCausalLM": (BERT, TOGETHER | PLAIN, ENDS),
    "OPTForCausalLM": (
        BERT | {"ffn_dim": 24, "word_embed_proj_dim": 16}, APART | PLAIN, ENDS | PLACES
    ),
    "BloomForCausalLM": (BERT | {"n_head": 4, "n_layer": 2}, TOGETHER | PLAIN, ENDS),
    "FalconForCausalLM": (BERT, TOGETHER | PLAIN, ENDS),
    "MptForCausalLM": (
        {"vocab_size": 40, "d_model": 16, "n_heads": 4, "n_layers": 2,
         "tie_word_embeddings": False},
        TOGETHER | PLAIN,
        ENDS,
    ),
    "ModernBertModel": (
        BERT, TOGETHER | {"gate_up_proj", "down_proj"}, TIED
    ),
    "BertModel": (
        BERT,
        APART | PLAIN,
        TIED | PLACES | {"embeddings.token_type_embeddings", "pooler.dense"},
    ),
    "T5ForConditionalGeneration": (
        T5 | {"feed_forward_proj": "gated-gelu"},
        APART | GATED | {"layer.0.SelfAttention.relative_attention_bias"},
        TIED,
    ),
    "BartForConditionalGeneration": (BART, APART | PLAIN, TIED | PLACES),
    "MambaForCausalLM": (
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
         "tie_word_embeddings": False},
        {f"mixer.{name}" for name in ("A_log", "in_proj", "x_proj", "dt_proj", "out_proj")},
        ENDS,
    ),
}  # fmt: skip


def shapes_of(model):
    return {name: tuple(each.shape) for name, each in model.named_parameters() if each.ndim == 2}


def tiny(name):
    """The model on no device, so that it takes no time."""
    made = getattr(transformers, name)
    with torch.device("meta"):
        return made(made.config_class(**FAMILIES[name][0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_share_the_names_of_their_modules_and_count_layers_alike(family):
    names = shapes_of(tiny(family))
    _, inside, outside = FAMILIES[family]
    found = {0: set(), 1: set(), None: set()}
    for name in names:
        found[layer_of(name)].add(module_of(name))
    assert found[0] == inside
    assert found[1] | {"layer.0.SelfAttention.relative_attention_bias"} >= inside
    assert found[None] == outside


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_what_their_shapes_say(family):
    # The widths of a layer tell attention from mlp, and up from down: 16 is the model's.
    for name, (rows, cols) in shapes_of(tiny(family)).items():
        module = module_of(name)
        if family == "GPT2LMHeadModel" and layer_of(name) is not None:
            rows, cols = cols, rows  # Conv1D
        if module in ("q_proj", "k_proj", "v_proj", "qkv_proj", "up_proj", "gate_proj"):
            assert cols == 16
        if module in ("gate_proj", "up_proj"):
            assert rows in (24, 64)
        if module in ("o_proj", "down_proj"):
            assert rows == 16
        if module in ("embed_tokens", "lm_head"):
            assert rows > 24
            assert cols == 16


def test_mixtrals_experts_are_named_as_they_are_stored(tmp_path):
    settings = HUGGING_FACE | {"num_local_experts": 2, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**settings)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    assert {module_of(name) for name in experts} == {f"experts.{module}" for module in GATED}
    down = {module_of(name) for name in experts if experts[name] == [16, 24]}
    assert down == {"experts.down_proj"}
    assert {layer_of(name) for name in experts} == {0}


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        # Llama as Meta released it, and torchtitan's
        ("layers.3.attention.wq.weight", 3, "q_proj"),
        ("layers.3.attention.wo.weight", 3, "o_proj"),
        ("layers.3.feed_forward.w1.weight", 3, "gate_proj"),
        ("layers.3.feed_forward.w2.weight", 3, "down_proj"),
        ("layers.3.feed_forward.w3.weight", 3, "up_proj"),
        ("tok_embeddings.weight", None, "embed_tokens"),
        ("output.weight", None, "lm_head"),
        # litgpt
        ("transformer.h.3.attn.qkv.weight", 3, "qkv_proj"),
        ("transformer.h.3.attn.proj.weight", 3, "o_proj"),
        ("transformer.h.3.mlp.fc_1.weight", 3, "gate_proj"),
        ("transformer.h.3.mlp.fc_2.weight", 3, "up_proj"),
        ("transformer.h.3.mlp.proj.weight", 3, "down_proj"),
        # pico-train
        ("layers.3.swiglu.w_0.weight", 3, "gate_proj"),
        ("de_embedding_proj.weight", None, "lm_head"),
        # what only looks like these
        ("layers.3.output.weight", 3, "output"),
        ("head.output.weight", None, "head.output"),
        ("layers.3.mixer.out_proj.weight", 3, "mixer.out_proj"),
        ("layers.3.adapter.w1.weight", 3, "adapter.w1"),
        ("fc1.weight", None, "fc1"),
        ("classifier.dense.weight", None, "classifier.dense"),
        ("encoder.layers.3.norm.weight", 3, "norm"),
        # stacks
        ("transformer.blocks.3.ffn.up_proj.weight", 3, "up_proj"),
        ("encoder.layer.12.output.dense.weight", 12, "down_proj"),
        ("model.decoder.layers.3.fc1.weight", 3, "up_proj"),
        ("decoder.block.3.layer.1.EncDecAttention.q.weight", 3, "q_proj"),
        ("transformer.h.3.attn.c_attn.v_proj.weight", 3, "v_proj"),
    ],
)
def test_other_spellings_and_what_only_resembles_them(name, layer, module):
    assert (layer_of(name), module_of(name)) == (layer, module)


def test_every_row_is_reached():
    for suffix, module in MODULES:
        path = suffix.replace("#", "7").removeprefix("^.")
        module = f"experts.{module}" if path.startswith("experts.") else module
        assert module_of(path + ".weight") == module
        if not suffix.startswith("^"):
            assert module_of(f"some.{path}.weight") == module


def test_projections_of_an_attention_share_its_path_fused_or_not():
    names = ["c_attn.q_proj.weight", "c_attn.k_proj", "c_proj.weight", "c_attn.weight"]
    assert {attention_path(f"h.3.attn.{name}") for name in names} == {"h.3.attn"}
    assert attention_path("lm_head.weight") == ""


# Wrappers ----------------------------------------------------------------------------------------

UP_WEIGHT = "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.model.layers.3.mlp.up_proj.weight",
        "module.module.model.layers.3.mlp.up_proj.weight",
        "_orig_mod.module.model.layers.3.mlp.up_proj.weight",
        "module._orig_mod.model.layers.3.mlp.up_proj.weight",
        "_forward_module.model.layers.3.mlp.up_proj.weight",
        "_forward_module.module.model.layers.3.mlp.up_proj.weight",
        "_fsdp_wrapped_module.model.layers.3._fsdp_wrapped_module.mlp.up_proj.weight",
        "model.layers.3._fsdp_wrapped_module.mlp.up_proj.weight",
        "model.layers.3._checkpoint_wrapped_module.mlp.up_proj.weight",
        "model.layers.3._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj.weight",
        "base_model.model.model.layers.3.mlp.up_proj.base_layer.weight",
        "module._orig_mod.base_model.model.model.layers.3.mlp.up_proj.base_layer.weight",
        "_orig_mod.base_model.model.model.layers.3._orig_mod.mlp.up_proj.weight",
        "model.layers.3._orig_mod.mlp.up_proj.weight",
        "model._orig_mod.layers.3.mlp.up_proj.weight",
        # a LightningModule's `model`, and what may be around and in it
        "model.model.layers.3.mlp.up_proj.weight",
        "model._orig_mod.model.layers.3.mlp.up_proj.weight",
        "model.module.model.layers.3.mlp.up_proj.weight",
        "_forward_module.model.model.layers.3.mlp.up_proj.weight",
        "_forward_module.model.base_model.model.model.layers.3.mlp.up_proj.base_layer.weight",
    ],
)
def test_wrappers_leave_no_trace_in_a_name(wrapped):
    assert clean_name(wrapped) == UP_WEIGHT
    assert clean_name(clean_name(wrapped)) == UP_WEIGHT


@pytest.mark.parametrize(
    ("held", "clean"),
    [
        ("model.transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("model.gpt_neox.embed_in.weight", "gpt_neox.embed_in.weight"),
        ("model.embed_out.weight", "embed_out.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        ("model.lm_head.base_layer.weight", "lm_head.weight"),
    ],
)
def test_the_model_of_a_lightning_module_has_its_own_names(held, clean):
    assert clean_name(held) == clean


@pytest.mark.parametrize(
    "name",
    [
        UP_WEIGHT,
        "model.embed_tokens.weight",
        "model.decoder.layers.0.fc1.weight",  # OPT's own; in a LightningModule BART's encoder
        "model.layers.0.attention.wq.weight",
        "model.module.layers.0.mlp.up_proj.weight",  # whose `module`?
        "model.lm_head.dense.weight",
        "blocks.0.module.weight",
        "encoder.model.layers.0.mlp.up_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
    ],
)
def test_what_may_be_the_models_own_name_stays(name):
    assert clean_name(name) == name


def wrappers():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.nn import DataParallel

    def lightning(model):
        held = torch.nn.Module()
        held.model = model
        return held

    def each_layer(wrap):
        def wrapped(model):
            for index, layer in enumerate(model.model.layers):
                model.model.layers[index] = wrap(layer)
            return model

        return wrapped

    checkpointed = checkpoint_wrapper.checkpoint_wrapper
    return {
        "torch.compile": torch.compile,
        "torch.compile of layers": each_layer(torch.compile),
        "DataParallel": DataParallel,
        "DataParallel of torch.compile": lambda model: DataParallel(torch.compile(model)),
        "torch.compile of DataParallel": lambda model: torch.compile(DataParallel(model)),
        "activation checkpointing": each_layer(checkpointed),
        "Lightning": lightning,
        "Lightning and torch.compile": lambda model: lightning(torch.compile(model)),
        "all of it": lambda model: DataParallel(
            lightning(torch.compile(each_layer(lambda m: checkpointed(torch.compile(m)))(model)))
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", wrappers())
def test_real_wrappers_leave_no_trace(wrapper, tiny_llama):
    model = tiny_llama()
    plain = set(model.state_dict())
    wrapped = wrappers()[wrapper](model)
    # torch's checkpoint wrapper takes its prefix out of a state_dict itself, but not out of these.
    names = [*wrapped.state_dict(), *(name for name, _ in wrapped.named_parameters())]
    assert {clean_name(name) for name in names} == plain
    assert set(names) != plain


@pytest.mark.parametrize("wrapper", ["torch.compile", "DataParallel", "Lightning"])
def test_real_wrappers_of_peft_models_leave_no_trace(wrapper, tiny_llama):
    peft = pytest.importorskip("peft")
    plain = set(tiny_llama().state_dict())
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = wrappers()[wrapper](peft.get_peft_model(tiny_llama(), config))
    names = [name for name in wrapped.state_dict() if "lora_" not in name]
    assert {clean_name(name) for name in names} == plain


def test_distributed_data_parallel_leaves_no_trace(tiny_llama, tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny_llama()
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.compile(model))
        assert {clean_name(name) for name in wrapped.state_dict()} == set(model.state_dict())
    finally:
        dist.destroy_process_group()


# Tied weights, globs -----------------------------------------------------------------------------

LLAMA = {"model.embed_tokens.weight": (40, 16), "lm_head.weight": (40, 16)}


@pytest.mark.parametrize(
    ("shapes", "config", "aliases"),
    [
        (LLAMA, {"tie_word_embeddings": True}, {"lm_head.weight"}),
        (LLAMA, {"tie_word_embeddings": False}, set()),
        (LLAMA, {}, set()),
        (LLAMA, None, set()),
        (LLAMA, {"text_config": {"tie_word_embeddings": True, "n_head": 2}}, {"lm_head.weight"}),
        (
            LLAMA,
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
            set(),
        ),
        (LLAMA | {"lm_head.bias": (40,)}, {"tie_word_embeddings": True}, {"lm_head.weight"}),
        ({"lm_head.weight": (40, 16)}, {"tie_word_embeddings": True}, set()),
        (LLAMA | {"lm_head.weight": (41, 16)}, {"tie_word_embeddings": True}, set()),
        (
            {"gpt_neox.embed_in.weight": (40, 16), "embed_out.weight": (40, 16)},
            {"tie_word_embeddings": True},
            {"embed_out.weight"},
        ),
    ],
)
def test_a_tied_output_embedding_is_the_input_embedding_once_more(shapes, config, aliases):
    assert tied_aliases(shapes, config) == aliases


def test_globs_match_with_and_without_weight():
    assert matches(UP_WEIGHT, "*.up_proj")
    assert matches(UP_WEIGHT, ["*q_proj", "model.layers.3.*"])
    assert not matches(UP_WEIGHT, "up_proj")
