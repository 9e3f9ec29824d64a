from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from dynamics.errors import DynamicsError
from probes.relora import TrainConfig
from probes.relora.config import METHODS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "sophia"},
            f"TrainConfig.method is 'sophia'; it must be one of {', '.join(METHODS)}.",
        ),
        ({"seed": -1}, "TrainConfig.seed is -1; it must be between 0 and 2^32 - 1."),
        ({"max_steps": 0}, "TrainConfig.max_steps is 0; it must be at least 1."),
        ({"lora_rank": 0}, "TrainConfig.lora_rank is 0; it must be at least 1."),
        ({"learning_rate": 0.0}, "TrainConfig.learning_rate is 0.0; it must be greater than 0."),
        (
            {"learning_rate": float("nan")},
            "TrainConfig.learning_rate is nan; it must be greater than 0.",
        ),
        ({"weight_decay": -0.1}, "TrainConfig.weight_decay is -0.1; it must be at least 0."),
        (
            {"optimizer_reset": "forget"},
            "TrainConfig.optimizer_reset is 'forget'; it must be one of drop, zero, random_prune, "
            "magnitude_prune.",
        ),
        (
            {"precision": "float16"},
            "TrainConfig.precision is 'float16'; it must be one of float32, bfloat16.",
        ),
        (
            {"adapter_start": "gaussian"},
            "TrainConfig.adapter_start is 'gaussian'; it must be one of kaiming, zero.",
        ),
        ({"prune_ratio": 2.0}, "TrainConfig.prune_ratio is 2.0; it must be between 0 and 1."),
        ({"min_lr_ratio": 1.5}, "TrainConfig.min_lr_ratio is 1.5; it must be between 0 and 1."),
        (
            {"lora_dropout": 1.0},
            "TrainConfig.lora_dropout is 1.0; it must be at least 0 and below 1.",
        ),
        (
            {"hidden_size": 36},
            "TrainConfig.hidden_size is 36; it must be a multiple of 2 · num_heads = 8.",
        ),
        (
            {"num_kv_heads": 3},
            "TrainConfig.num_kv_heads is 3; it must be a divisor of num_heads = 4.",
        ),
        (
            {"warmup_steps": 20},
            "TrainConfig.warmup_steps is 20; it must be at most max_steps = 16.",
        ),
        (
            {"warmup_steps": 5},
            "TrainConfig.warmup_steps is 5; it must be at most reset_every = 4, so that it ends "
            "before the first merge.",
        ),
        (
            {"restart_warmup_steps": 4},
            "TrainConfig.restart_warmup_steps is 4; it must be below reset_every = 4.",
        ),
        (
            {"target_modules": ("q_proj", "c_attn")},
            "TrainConfig.target_modules is ('q_proj', 'c_attn'); it must be one or more of q_proj, "
            "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.",
        ),
        (
            {"target_modules": ()},
            "TrainConfig.target_modules is (); it must be one or more of q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj.",
        ),
    ],
)
def test_a_bad_value_is_refused_in_one_line(
    config: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DynamicsError) as refused:
        replace(config, **changes)
    assert str(refused.value) == message


def test_a_config_is_keyword_only_and_frozen(config: TrainConfig) -> None:
    with pytest.raises(TypeError):
        TrainConfig("relora", 0)  # type: ignore[call-arg, misc]
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_the_scaling_is_alpha_over_r(config: TrainConfig) -> None:
    assert replace(config, lora_alpha=32.0, lora_rank=16).scaling == 2.0


@pytest.mark.parametrize("method", ["full_rank", "lora"])
def test_cycles_bind_only_the_method_that_has_them(config: TrainConfig, method: str) -> None:
    assert replace(config, method=method, warmup_steps=5, restart_warmup_steps=4).adapted == (
        method == "lora"
    )
