"""The sizes of the reference experiment: tiny and small as published, micro for two CPU cores.

Source of the published values: Weiss et al. 2025, arXiv 2509.12960, and the authors' code,
github.com/Yu-val-weiss/relora-pico (configs/pico-relora-{tiny,small}.yaml, src/config/), a fork of
github.com/pico-lm/pico-train, whose defaults it keeps.
"""

from collections.abc import Callable
from dataclasses import replace

from dynamics.errors import DynamicsError
from probes.relora.config import ADAPTED, TrainConfig


def tiny(method: str = "relora") -> TrainConfig:
    """The published run of 11 M parameters: d = 96, 20,000 steps of 2.1 M tokens.

    Args:
        method: one of `config.METHODS`.

    Example:
        >>> from probes.relora import tiny
        >>> config = tiny("full_rank")
        >>> config.hidden_size, config.num_layers, config.max_steps
        (96, 12, 20000)
    """
    return _published(method, hidden_size=96, intermediate_size=384)


def small(method: str = "relora") -> TrainConfig:
    """The published run of 65 M parameters: d = 384, 20,000 steps of 2.1 M tokens.

    Args:
        method: one of `config.METHODS`.

    Example:
        >>> from probes.relora import small
        >>> config = small("full_rank")
        >>> config.hidden_size, config.num_layers, config.max_steps
        (384, 12, 20000)
    """
    return _published(method, hidden_size=384, intermediate_size=1536)


# The peak rate of the matrices at micro: the best of a search by factors of two (experiment.md),
# with one rate for embeddings, norms and the head of all methods.
_MICRO_RATES = {
    "full_rank": 1e-3,
    "relora": 4e-3,
    "lora": 4e-3,
    "galore": 1.6e-2,
    "fira": 8e-3,
    "apollo": 3.2e-2,
    "muon": 2e-2,
    "cola": 1e-3,
    "sltrain": 8e-3,
}
_MICRO_OTHER_RATE = 8e-3


def micro(method: str = "relora") -> TrainConfig:
    """The published proportions in 800 steps: 1.3 M parameters, 1.6 M tokens, nine merges.

    It takes about four minutes on one CPU core. As published, a cycle is one tenth of the run and
    begins with a ramp of one twentieth of the cycle, the first warm-up is one cycle, and s = 2.
    Each method has the rate that suits its matrices at this size.

    Args:
        method: one of `config.METHODS`.

    Example:
        >>> from probes.relora import micro
        >>> config = micro("full_rank")
        >>> config.hidden_size, config.num_layers, config.max_steps
        (128, 4, 800)
    """
    return TrainConfig(
        method=method,
        seed=0,
        hidden_size=128,
        intermediate_size=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=2048,
        sequence_length=128,
        max_steps=800,
        batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=_MICRO_RATES.get(method, 0.0),  # an unknown method is refused by its name
        other_learning_rate=_MICRO_OTHER_RATE,
        weight_decay=0.0,
        max_grad_norm=1.0,
        warmup_steps=80,
        restart_warmup_steps=4,
        reset_every=80,
        lora_rank=8,
        lora_alpha=16.0,
        log_every=20,
        evaluate_every=80,
        record_every=20,
        save_every=400,
    )


PRESETS: dict[str, Callable[..., TrainConfig]] = {"tiny": tiny, "small": small, "micro": micro}


def as_published(config: TrainConfig) -> TrainConfig:
    """The same run with the defects of the published code; `dynamics audit` detects them.

    For adapters: A and B are both zero until the first merge (`keep_original_weights` sets A to
    zero, and LoRA starts with B zero); merges add B·A without the scale s of the forward pass; and
    random pruning of 99.9 % draws a mask of its own for each moment. For full rank: the warm-up
    has 2500 steps where ReLoRA has 2000, a quarter more.

    Not reproduced: in the published code the merge came one step after the restart of the learning
    rate (`batch_step % reset_frequency == 1`).

    Args:
        config: the run as it should be.

    Raises:
        DynamicsError: the published code does not have this method.

    Example:
        >>> from probes.relora import as_published, micro
        >>> config = as_published(micro())
        >>> config.adapter_start, config.merge_with_scaling, config.optimizer_reset
        ('zero', False, 'random_prune')
    """
    if config.method not in ("full_rank", *ADAPTED):
        raise DynamicsError(
            f"{config.method} is not in the published code; leave out the variant as_published."
        )
    if not config.adapted:
        return replace(config, warmup_steps=config.warmup_steps * 5 // 4)
    return replace(
        config,
        adapter_start="zero",
        merge_with_scaling=False,
        optimizer_reset="random_prune",
        prune_ratio=0.999,
        shared_prune_mask=False,
    )


def _published(method: str, *, hidden_size: int, intermediate_size: int) -> TrainConfig:
    return TrainConfig(
        method=method,
        seed=42,  # trainer.py: seed_everything(42)
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        # ModelConfig's defaults.
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        vocab_size=50304,
        sequence_length=2048,
        dataset="pico-lm/pretokenized-dolma",  # DatasetConfig
        tokenizer="allenai/OLMo-7B-0724-hf",  # TokenizerConfig
        # The published order from its first sequence on; `evaluate` validates.
        validation_sequences=0,
        # The paper. The code's default is 200,000, and its configs do not set it: the decay may
        # have been laid out over more steps than were trained.
        max_steps=20_000,
        # 1024 sequences a step as published; the split changes only the memory that it takes.
        batch_size=32,
        gradient_accumulation_steps=32,
        precision="bfloat16",  # FabricConfig: bf16-mixed
        learning_rate=3e-4,  # OptimizationConfig
        # What torch's AdamW takes by default. It would end GaLore's bound.
        weight_decay=0.0 if method == "galore" else 0.01,
        max_grad_norm=0.0,  # the published loop does not clip
        # configs/pico-relora-*.yaml; the full-rank runs had 2500, see `as_published`.
        warmup_steps=2000,
        restart_warmup_steps=100,
        min_lr_ratio=0.1,
        reset_every=2000,
        lora_rank=16,
        # ReLoRAConfig's defaults.
        lora_alpha=32.0,
        lora_dropout=0.1,
        log_every=100,
        evaluate_every=1000,
        record_every=1000,
        save_every=1000,
    )
