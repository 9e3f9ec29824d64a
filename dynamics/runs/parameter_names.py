"""Parameter names: without the prefixes of wrappers; the layer and the module that they belong to.

A model family is a few rows of `MODULES`.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

# Names that no model gives its own modules: torch.compile, FSDP, activation checkpointing,
# Lightning's strategies, PEFT. They may stand anywhere, as any module can be wrapped.
_WRAPPED = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
    r"|base_model\.model)\."
)
# DataParallel and DeepSpeed; further inside, a model may have a `module` of its own.
_PARALLEL = re.compile(r"^(?:module\.)+")
# The attribute that LightningModules usually keep their model in. `model.` begins the names of
# many models themselves, so it is stripped only before what begins a whole model's names.
_HELD = re.compile(
    r"^(?:model\.)+(?:module\.)*"
    r"(?=(?:model|transformer|gpt_neox)\.|(?:lm_head|embed_out)(?:\.weight|\.bias)?$)"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")

_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
# Where a model has several stacks of layers -> what their paths say, the outermost first.
_STACKS = (
    ("text", re.compile(r"(?:^|\.)(?:text_model|text_encoder|language_model)\.")),
    ("vision", re.compile(r"(?:^|\.)(?:vision\w*|visual|image_encoder)\.")),
    ("audio", re.compile(r"(?:^|\.)(?:audio\w*|speech\w*)\.")),
    ("encoder", re.compile(r"(?:^|\.)encoder\.")),
    ("decoder", re.compile(r"(?:^|\.)decoder\.")),
)
_STAGE = re.compile(r"(?:^|\.)stages\.(\d+)\.")  # of vision models that count layers per stage
_CROSS = re.compile(
    r"(?:^|\.)(?:EncDecAttention|encoder_attn|crossattention|cross_attn|cross_attention)\."
)
# Modules of one attention that lie in two of its submodules: BERT's, ViT's.
_WITHIN_ATTENTION = re.compile(r"(?<=\battention)\.(?:self|output|attention)$")
_SHARED_EXPERT = re.compile(r"(?:^|\.)shared_experts?\.")

QKV, KV, GATE_UP = "qkv_proj", "kv_proj", "gate_up_proj"
FUSED = (QKV, KV, GATE_UP)  # the modules that hold several projections, see `dynamics.runs.fused`

# Suffix of a parameter's path -> module; `#` is a number, `^` stands before the first component.
# The module names are Llama's, so that families compare. The first row that fits counts.
MODULES: tuple[tuple[str, str], ...] = (
    # Llama, Mistral, Qwen, Gemma, OLMo, StableLM; most of it in many others
    *((name, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *((name, name) for name in ("gate_proj", "up_proj", "down_proj")),
    ("embed_tokens", "embed_tokens"),
    ("lm_head", "lm_head"),
    # Llama as Meta released it, torchtitan
    ("attention.wq", "q_proj"),
    ("attention.wk", "k_proj"),
    ("attention.wv", "v_proj"),
    ("attention.wo", "o_proj"),
    ("attention.wqkv", QKV),  # InternLM2
    ("feed_forward.w1", "gate_proj"),
    ("feed_forward.w2", "down_proj"),
    ("feed_forward.w3", "up_proj"),
    ("tok_embeddings", "embed_tokens"),
    ("^.output", "lm_head"),
    # Mixtral's experts
    ("experts.#.w1", "gate_proj"),
    ("experts.#.w2", "down_proj"),
    ("experts.#.w3", "up_proj"),
    # what chooses experts: most families; Mixtral; GraniteMoE; Jamba, Llama 4; Nemotron-H
    ("mlp.gate", "router"),
    ("block_sparse_moe.gate", "router"),
    ("router.layer", "router"),
    *((f"{mixture}.router", "router") for mixture in ("mlp", "block_sparse_moe", "feed_forward")),
    ("mlp.router.gate", "router"),  # Hunyuan
    ("moe.gate", "router"),
    ("moe.router", "router"),
    ("mixer.gate", "router"),
    # pico-train
    ("swiglu.w_0", "gate_proj"),
    ("swiglu.w_1", "up_proj"),
    ("swiglu.w_2", "down_proj"),
    ("embedding_proj", "embed_tokens"),
    ("de_embedding_proj", "lm_head"),
    # GPT-NeoX, Pythia; BLOOM, Falcon; Persimmon
    ("embed_in", "embed_tokens"),
    ("embed_out", "lm_head"),
    ("word_embeddings", "embed_tokens"),
    ("query_key_value", QKV),
    ("attention.dense", "o_proj"),
    ("self_attention.dense", "o_proj"),
    ("self_attn.dense", "o_proj"),  # and Phi
    ("mlp.dense_h_to_4h", "up_proj"),
    ("mlp.dense_4h_to_h", "down_proj"),
    # GPT-2, nanoGPT, GPT-BigCode, Starcoder2
    ("wte", "embed_tokens"),
    ("wpe", "embed_positions"),
    ("attn.c_attn", QKV),
    ("attn.c_proj", "o_proj"),
    ("crossattention.q_attn", "q_proj"),
    ("crossattention.c_attn", KV),
    ("crossattention.c_proj", "o_proj"),
    ("mlp.c_fc", "up_proj"),
    ("mlp.c_proj", "down_proj"),
    # GPT-J, GPT-Neo, CodeGen, OPT, BART, Phi, Phi-3, GLM
    ("qkv_proj", QKV),
    ("gate_up_proj", GATE_UP),
    *((f"{attention}.out_proj", "o_proj") for attention in ("attn", "attention", "self_attn")),
    ("encoder_attn.out_proj", "o_proj"),
    ("mlp.fc_in", "up_proj"),
    ("mlp.fc_out", "down_proj"),
    ("mlp.fc1", "up_proj"),
    ("mlp.fc2", "down_proj"),
    ("layers.#.fc1", "up_proj"),
    ("layers.#.fc2", "down_proj"),
    ("embed_positions", "embed_positions"),
    # MPT, ModernBERT
    ("attn.Wqkv", QKV),
    ("attn.Wo", "o_proj"),
    ("mlp.Wi", GATE_UP),
    ("mlp.Wo", "down_proj"),
    # litgpt
    ("attn.qkv", QKV),
    ("attn.proj", "o_proj"),
    ("mlp.fc", "up_proj"),
    ("mlp.fc_1", "gate_proj"),
    ("mlp.fc_2", "up_proj"),
    ("mlp.proj", "down_proj"),
    # BERT, RoBERTa, ELECTRA
    ("attention.attention.query", "q_proj"),  # ViT and its kin
    ("attention.attention.key", "k_proj"),
    ("attention.attention.value", "v_proj"),
    ("patch_embeddings.projection", "embed_patches"),
    ("patch_embedding", "embed_patches"),
    ("attention.self.query", "q_proj"),
    ("attention.self.key", "k_proj"),
    ("attention.self.value", "v_proj"),
    ("attention.output.dense", "o_proj"),
    ("intermediate.dense", "up_proj"),
    ("layer.#.output.dense", "down_proj"),
    ("position_embeddings", "embed_positions"),
    ("predictions.decoder", "lm_head"),
    ("lm_head.decoder", "lm_head"),
    # T5; BART's shared embedding
    *(
        (f"{attention}.{letter}", f"{letter}_proj")
        for attention in ("SelfAttention", "EncDecAttention")
        for letter in "qkvo"
    ),
    ("DenseReluDense.wi", "up_proj"),
    ("DenseReluDense.wi_0", "gate_proj"),
    ("DenseReluDense.wi_1", "up_proj"),
    ("DenseReluDense.wo", "down_proj"),
    ("^.shared", "embed_tokens"),
    ("^.model.shared", "embed_tokens"),
    ("^.proj_out", "lm_head"),  # Whisper
    # RWKV, whose feed-forward layers gate with the receptance
    ("feed_forward.key", "up_proj"),
    ("feed_forward.value", "down_proj"),
    ("feed_forward.receptance", "gate_proj"),
    ("rwkv.embeddings", "embed_tokens"),
    # Mamba; its mixers have no counterpart in a transformer
    ("backbone.embeddings", "embed_tokens"),
)


def clean_name(name: str) -> str:
    """The parameter's name as the unwrapped model spells it.

    >>> clean_name("module._orig_mod.base_model.model.lm_head.weight")
    'lm_head.weight'
    >>> clean_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> clean_name("model.model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    name = _PARALLEL.sub("", _WRAPPED.sub("", name)).replace(".base_layer.", ".")
    return _HELD.sub("", name)


def layer_of(name: str) -> int | None:
    """The index of the layer that a parameter belongs to, None outside the stack.

    >>> layer_of("model.layers.11.self_attn.q_proj.weight"), layer_of("lm_head.weight")
    (11, None)
    """
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """The index of the routed expert that a matrix belongs to, None outside of experts.

    >>> expert_of("model.layers.0.mlp.experts.17.up_proj.weight"), expert_of("mlp.up_proj.weight")
    (17, None)
    """
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def module_of(name: str) -> str:
    """The role of a parameter, spelled the same for all model families.

    Names that no row of `MODULES` knows keep their path after the layer index. The matrices of
    experts are told from those of dense layers, because their ranks mean something else.

    >>> module_of("transformer.h.3.mlp.c_fc.weight"), module_of("net.blocks.0.mixer.in.weight")
    ('up_proj', 'mixer.in')
    >>> module_of("layers.0.mlp.experts.5.up_proj.weight"), module_of("mlp.shared_expert.up_proj")
    ('experts.up_proj', 'shared_expert.up_proj')
    """
    path = name.removesuffix(".weight")
    numbered = "^." + re.sub(r"(?<=\.)\d+(?=\.)", "#", path)
    for suffix, module in MODULES:
        if numbered == suffix or numbered.endswith("." + suffix):
            if _EXPERT.search(name):
                return f"experts.{module}"
            return f"shared_expert.{module}" if _SHARED_EXPERT.search(name) else module
    match = _LAYER.search(path + ".")
    return path[match.end() :] if match and path[match.end() :] else path


def stack_of(name: str) -> str:
    """Which stack of layers a matrix belongs to, where the name says so; "" elsewhere.

    These are "encoder" and "decoder", "text", "vision" and "audio" of multimodal models, and
    "stage 0", ... of vision models that count their layers in each stage.

    >>> stack_of("decoder.block.0.layer.1.EncDecAttention.q.weight"), stack_of("h.0.attn.c_proj")
    ('decoder', '')
    """
    if match := _STAGE.search(name):
        return f"stage {match[1]}"
    return next((stack for stack, pattern in _STACKS if pattern.search(name)), "")


def attention_of(name: str) -> str:
    """The attention of a layer that a matrix belongs to: "self" or "cross"; "" elsewhere.

    >>> attention_of("model.decoder.layers.0.encoder_attn.q_proj.weight")
    'cross'
    >>> attention_of("model.layers.0.self_attn.q_proj.weight"), attention_of("mlp.up_proj.weight")
    ('self', '')
    """
    if _CROSS.search(name):
        return "cross"
    is_part = module_of(name) in (QKV, KV, "q_proj", "k_proj", "v_proj", "o_proj")
    return "self" if is_part or "_circuit" in name else ""


def attention_path(name: str) -> str:
    """The path of the module that a projection belongs to, also that of a fused matrix's part.

    >>> attention_path("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn'
    >>> attention_path("transformer.h.0.attn.c_attn.q_proj.weight")
    'transformer.h.0.attn'
    >>> attention_path("encoder.layer.0.attention.self.query.weight")
    'encoder.layer.0.attention'
    """
    path = name.removesuffix(".weight").rpartition(".")[0]
    path = path.rpartition(".")[0] if module_of(path) in FUSED else path
    return _WITHIN_ATTENTION.sub("", path)


def natural_order(name: str) -> list[str | int]:
    """A sort key that puts layer 2 before layer 10.

    >>> sorted(["layers.10.up", "layers.2.up"], key=natural_order)
    ['layers.2.up', 'layers.10.up']
    """
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a clean parameter name matches any glob, with or without its `.weight`.

    >>> matches("model.layers.0.self_attn.q_proj.weight", "*_proj")
    True
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(
        fnmatchcase(each, pattern)
        for pattern in patterns
        for each in (name, name.removesuffix(".weight"))
    )
