"""The model of the experiment: a small Llama, and the same with LoRA adapters."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import LlamaConfig, LlamaForCausalLM

from probes.relora.config import TrainConfig
from probes.relora.seeding import ADAPTERS, MODEL_WEIGHTS, own_random_stream

END_OF_TEXT_ID = 0


def build_model(config: TrainConfig) -> LlamaForCausalLM:
    """A Llama decoder with weights drawn from the config's seed.

    RMSNorm (eps 1e-6), rotary embeddings (θ = 10000), SwiGLU, grouped-query attention, no
    biases, embedding and lm_head not tied. torch's global random state stays as it was.
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
    """The model with a LoRA adapter on every targeted linear layer; it computes the same function.

    W_eff = W + s·B·A with s = alpha/r, A Kaiming-uniform from the config's seed and B zero (not
    both zero, or no gradient would ever reach either; the config's adapter_start "zero" does just
    that). Only the targeted weights are frozen: embeddings, norms, lm_head and untargeted linear
    layers train at full rank, as in the paper.
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
        # PEFT asks for a property that transformers has renamed; nothing a user could change.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        # PEFT froze the whole base model; what it wrapped is called `.base_layer.`.
        if ".base_layer." not in name:
            parameter.requires_grad_(True)
        if config.adapter_start == "zero" and LoraModel.prefix in name:
            torch.nn.init.zeros_(parameter)
    return adapted


def parameter_counts(config: TrainConfig) -> tuple[int, int]:
    """Trainable and total parameters of a run's model, without building it.

    Full rank trains all of: two embeddings of V·d, 2L + 1 norms of d, and per layer q, k, v, o,
    gate, up and down. An adapter adds r·(m + n) to each targeted (m, n), whose own m·n are frozen.
    """
    shapes = linear_shapes(config)
    dense = config.num_layers * sum(rows * cols for rows, cols in shapes.values())
    others = (2 * config.vocab_size + 2 * config.num_layers + 1) * config.hidden_size
    if not config.adapted:
        return dense + others, dense + others
    targeted = [shapes[name] for name in config.target_modules]
    frozen = config.num_layers * sum(rows * cols for rows, cols in targeted)
    adapters = config.num_layers * config.lora_rank * sum(rows + cols for rows, cols in targeted)
    return dense + others - frozen + adapters, dense + others + adapters


def linear_shapes(config: TrainConfig) -> dict[str, tuple[int, int]]:
    """Linear layer of a block -> (rows, cols) of its weight."""
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
