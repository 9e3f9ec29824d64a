"""The short run of the reference trainer that several test packages train."""

from dataclasses import replace

from probes.relora import TrainConfig, micro

MERGES = [6, 12, 18]
TEXT = " ".join(f"{n} squared is {n * n}." for n in range(9000))


def short_config(**changes) -> TrainConfig:
    """2 layers, r = 2, 24 steps, merges at 6, 12, 18: seconds."""
    config = replace(
        micro(),
        learning_rate=1e-3,
        other_learning_rate=0.0,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        vocab_size=300,
        sequence_length=32,
        max_steps=24,
        batch_size=8,
        warmup_steps=2,
        restart_warmup_steps=1,
        reset_every=6,
        lora_rank=2,
        lora_alpha=4.0,
        log_every=3,
        evaluate_every=6,
        record_every=3,
        save_every=6,
        validation_sequences=16,
    )
    return replace(config, **changes)
