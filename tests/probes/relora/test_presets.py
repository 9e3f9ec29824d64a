"""The presets, as published, and how a command line changes them."""

from dataclasses import replace

import pytest
import torch

from dynamics.errors import DynamicsError
from probes.relora import (
    PRESETS,
    TrainConfig,
    add_adapters,
    as_published,
    build_model,
    micro,
    parameter_counts,
    small,
    tiny,
)
from probes.relora.settings import config_from_words, parse_settings, setting_text, with_settings
from probes.relora.sweep_plan import train_words
from probes.relora.training.schedule import schedule_of

PUBLISHED = {
    (tiny, "full_rank"): (11_282_784, 11_282_784),
    (tiny, "relora"): (10_060_128, 11_682_144),
    (small, "full_rank"): (64_595_328, 64_595_328),
    (small, "relora"): (40_240_512, 66_192_768),
}


@pytest.mark.parametrize(
    ("preset", "method"), PUBLISHED, ids=lambda each: getattr(each, "__name__", each)
)
def test_the_published_models_have_the_published_parameter_counts(preset, method) -> None:
    config = preset(method)
    with torch.device("meta"):
        model = build_model(config)
        if config.adapted:
            model = add_adapters(model, config)
    parameters = list(model.parameters())
    trainable = sum(each.numel() for each in parameters if each.requires_grad)
    assert (trainable, sum(each.numel() for each in parameters)) == PUBLISHED[preset, method]
    assert parameter_counts(config) == PUBLISHED[preset, method]


@pytest.mark.parametrize("method", ["full_rank", "relora", "lora"])
@pytest.mark.parametrize("modules", [("q_proj", "down_proj"), ("k_proj", "gate_proj", "o_proj")])
def test_parameters_are_counted_without_a_model(method, modules) -> None:
    config = replace(micro(method), target_modules=modules, lora_rank=3)
    with torch.device("meta"):
        model = build_model(config)
        if config.adapted:
            model = add_adapters(model, config)
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    total = sum(each.numel() for each in model.parameters())
    assert parameter_counts(config) == (trainable, total)


def test_the_published_runs_see_two_million_tokens_a_step_in_bfloat16() -> None:
    for preset in (tiny, small):
        config = preset()
        assert config.sequences_per_step * config.sequence_length == 2_097_152
        assert (config.max_steps, config.reset_every, config.precision) == (
            20_000,
            2000,
            "bfloat16",
        )
        assert (config.lora_rank, config.scaling, config.lora_dropout) == (16, 2.0, 0.1)
        assert config.dataset == "pico-lm/pretokenized-dolma"


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0), (1000, 0.5), (2000, 0), (2050, 0.5), (19_999, 0.1), (18_000, 0)],
)
def test_the_published_schedule_at_its_corners(step: int, expected: float) -> None:
    assert schedule_of(tiny())(step) == pytest.approx(expected, abs=1e-4)


def test_micro_has_the_published_proportions() -> None:
    config, published = micro(), tiny()
    scale = published.max_steps // config.max_steps
    assert config.warmup_steps * scale == published.warmup_steps
    assert config.reset_every * scale == published.reset_every
    assert config.restart_warmup_steps * scale == published.restart_warmup_steps
    assert config.scaling == published.scaling
    merges = range(config.reset_every, config.max_steps, config.reset_every)
    assert len(merges) == 9
    for period in (config.save_every, config.evaluate_every):
        assert period % config.record_every == 0
    rate = micro("full_rank").learning_rate
    assert replace(config, method="full_rank", learning_rate=rate) == micro("full_rank")


def test_as_published_changes_what_the_published_code_did_otherwise() -> None:
    relora, full_rank = as_published(tiny()), as_published(tiny("full_rank"))
    assert not relora.merge_with_scaling
    assert not relora.shared_prune_mask
    assert (relora.adapter_start, relora.prune_ratio) == ("zero", 0.999)
    assert (full_rank.warmup_steps, relora.warmup_steps) == (2500, 2000)


def test_settings_are_parsed_as_their_fields() -> None:
    words = ["lora_rank=4", "scaling=3", "target_modules=q_proj+v_proj", "learning_rate=2e-3"]
    words += ["merge_with_scaling=false", "dataset=some/where", "tokenizer=none"]
    config = with_settings(tiny(), parse_settings(words))
    assert (config.lora_rank, config.lora_alpha, config.scaling) == (4, 12.0, 3.0)
    assert config.target_modules == ("q_proj", "v_proj")
    assert (config.learning_rate, config.merge_with_scaling) == (2e-3, False)
    assert (config.dataset, config.tokenizer) == ("some/where", None)
    attention = with_settings(tiny(), {"target_modules": "attention"})
    assert attention.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora_rank"], "--set takes field=value; found 'lora_rank'."),
        (["rank=4"], "No field 'rank'; known: method, seed,"),
        (["lora_rank=four"], "lora_rank is 'four'; it must be a number of type int."),
        (["shared_prune_mask=1"], "shared_prune_mask is '1'; it must be true or false."),
        (["lora_rank=4", "lora_rank=8"], "--set lora_rank is given twice; give it once."),
        (["scaling=1", "lora_alpha=4"], "scaling is lora_alpha / lora_rank; set one of the two."),
    ],
)
def test_settings_that_cannot_be_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(DynamicsError) as refused:
        config_from_words("micro", "relora", {}, words)
    assert str(refused.value).startswith(message)
    with pytest.raises(DynamicsError, match="No preset 'huge'; known: tiny, small, micro"):
        config_from_words("huge", "relora", {}, [])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", ["full_rank", "relora"])
def test_the_words_of_a_config_give_it_again(preset: str, method: str) -> None:
    config = replace(
        as_published(PRESETS[preset](method)), seed=7, tokenizer=None, target_modules=("v_proj",)
    )
    words = train_words(preset, config)
    assert words[:4] == ["train", preset, "--method", method]
    settings = [word.removeprefix("--set=") for word in words[4:]]
    assert config_from_words(preset, method, {}, settings) == config


def test_every_field_is_written_as_it_is_read() -> None:
    config: TrainConfig = micro()
    fields = {name: setting_text(value) for name, value in vars(config).items()}
    assert with_settings(tiny("full_rank"), fields) == config
