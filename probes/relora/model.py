"""The model of the experiment: a small Llama, with or without LoRA adapters."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import LlamaConfig, LlamaForCausalLM

from probes.relora.config import TrainConfig
from probes.relora.layers.sltrain import sparse_entries
from probes.relora.seeding import ADAPTERS, MODEL_WEIGHTS, own_random_stream

END_OF_TEXT_ID = 0


def build_model(config: TrainConfig) -> LlamaForCausalLM:
    """Build a Llama decoder; the seed of the config decides its weights.

    RMSNorm (eps 1e-6), rotary embeddings (θ = 10000), SwiGLU, grouped-query attention, no
    biases, embedding and lm_head not tied. The global random state of torch does not change.

    Args:
        config: gives the sizes and the seed.

    Example:
        >>> from probes.relora import build_model, micro
        >>> model = build_model(micro())
        >>> sum(parameter.numel() for parameter in model.parameters())
        1311872
    """
    llama = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.sequence_length,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    with own_random_stream(config.seed, MODEL_WEIGHTS):
        return LlamaForCausalLM(llama)


def add_adapters(model: LlamaForCausalLM, config: TrainConfig) -> PeftModel:
    """Add a LoRA adapter to every targeted linear layer; the model computes the same function.

    W_eff = W + s·B·A with s = alpha/r. A is drawn Kaiming-uniform with the seed of the config, and
    B is zero. (If both were zero, no gradient would reach either of them; `adapter_start="zero"`
    does this on purpose.) Only the targeted weights are frozen. Embeddings, norms, lm_head and
    other linear layers train at full rank, as in the paper.

    Args:
        model: from `build_model`; it is changed in place.
        config: gives the rank, alpha, dropout, target modules and seed.

    Example:
        >>> from probes.relora import add_adapters, build_model, micro
        >>> model = add_adapters(build_model(micro()), micro())
        >>> model.get_nb_trainable_parameters()
        (603264, 1389696)
    """
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with own_random_stream(config.seed, ADAPTERS, 0, module=model), warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; users can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        # PEFT froze the whole base model. The layers that it wrapped are called `.base_layer.`.
        if ".base_layer." not in name:
            parameter.requires_grad_(True)
        if config.adapter_start == "zero" and LoraModel.prefix in name:
            torch.nn.init.zeros_(parameter)
    return adapted


def parameter_counts(config: TrainConfig) -> tuple[int, int]:
    """The numbers of trainable and of all parameters of a run, without building its model.

    Full rank trains everything: two embeddings of V·d, 2L + 1 norms of d, and in each layer q, k,
    v, o, gate, up and down. An adapter adds r·(m + n) parameters to each targeted (m, n) matrix,
    and freezes its m·n. CoLA has the r·(m + n) in its place, and SLTrain int(δ·m·n) beside them.

    Args:
        config: the run.

    Returns:
        (trainable, total)

    Example:
        >>> from probes.relora import micro, parameter_counts
        >>> parameter_counts(micro("full_rank")), parameter_counts(micro("relora"))
        ((1311872, 1311872), (603264, 1389696))
    """
    shapes = linear_shapes(config)
    dense = config.num_layers * sum(rows * cols for rows, cols in shapes.values())
    others = (2 * config.vocab_size + 2 * config.num_layers + 1) * config.hidden_size
    targeted = [shapes[name] for name in config.target_modules]
    frozen = config.num_layers * sum(rows * cols for rows, cols in targeted)
    adapters = config.num_layers * config.lora_rank * sum(rows + cols for rows, cols in targeted)
    if config.factored:
        dense += adapters - frozen
    if config.method == "sltrain":
        dense += config.num_layers * sum(
            sparse_entries(rows, cols, config.sparsity) for rows, cols in targeted
        )
    if not config.adapted:
        return dense + others, dense + others
    return dense + others - frozen + adapters, dense + others + adapters


def linear_shapes(config: TrainConfig) -> dict[str, tuple[int, int]]:
    """Name of a linear layer -> (rows, cols) of its weight."""
    hidden, width = config.hidden_size, config.intermediate_size
    shared = config.num_kv_heads * hidden // config.num_heads
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (shared, hidden),
        "v_proj": (shared, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
