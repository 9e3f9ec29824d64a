"""The plan of a sweep: its runs, what they are matched by, and whether their schedules agree."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dynamics.errors import DynamicsError
from probes.relora.config import (
    ADAPTED,
    ADAPTER_FIELDS,
    FACTORED,
    METHODS,
    PROJECTED,
    PROJECTION_FIELDS,
    RESTART_FIELDS,
    TrainConfig,
)
from probes.relora.model import parameter_counts
from probes.relora.presets import PRESETS
from probes.relora.settings import SCALING, config_from_words, parse_settings, setting_text
from probes.relora.training.schedule import schedule_of

MATCHES = ("steps", "tokens", "trainable_parameters")
AS_PUBLISHED = "as_published"


class DifferentSchedulesWarning(UserWarning):
    """Runs of a sweep also differ in their learning rates."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its folder: the method and the varied fields.
        config: the run.
        varied: varied field -> value, with `method` (the word that it was planned from) and
            `seed`; None for a field that has no effect on the method.
    """

    name: str
    config: TrainConfig
    varied: dict[str, Any]


def plan(
    preset: str,
    *,
    methods: Sequence[str],
    words: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    given: Mapping[str, Any] | None = None,
    published: bool = False,
    match: str = "steps",
) -> list[SweepRun]:
    """Every combination of the methods, the values of each setting, and the seeds, once.

    Args:
        preset: one of `PRESETS`.
        methods: some of `METHODS`, or "all" alone. METHOD:as_published is the method with the
            defects of the published code; methods without them may stand beside it.
        words: field=value or field=value,value,...; a field with several values is varied.
        seeds: the seeds of the runs.
        given: field -> value, as in `config_from_words`.
        published: as in `config_from_words`, for all methods.
        match: what all runs get as much of as the first run: "steps" changes nothing; "tokens"
            sets `max_steps`; "trainable_parameters" sets `lora_rank`, to the nearest, and keeps
            the scaling.

    Raises:
        DynamicsError: see `config_from_words`; or the runs cannot be matched.
    """
    settings = parse_settings(words)
    axes = {name: value.split(",") for name, value in settings.items()}
    rows = itertools.product(*axes.values())
    combinations = [dict(zip(axes, row, strict=True)) for row in rows]
    several = [name for name, values in axes.items() if len(values) > 1]
    runs: dict[str, SweepRun] = {}
    words_of_methods = METHODS if list(methods) == ["all"] else methods
    for word, row, seed in itertools.product(words_of_methods, combinations, seeds):
        method, marked = _variant(word)
        chosen = {name: value for name, value in row.items() if _matters(name, method)}
        varied = {name: chosen.get(name) for name in several}
        words_of_name = [f"{name}={value}" for name, value in varied.items() if value is not None]
        name = "-".join([word.replace(":", "-"), *words_of_name, f"seed={seed}"]).replace("/", "_")
        config = config_from_words(
            preset,
            method,
            {**(given or {}), "seed": seed},
            [f"{name}={value}" for name, value in chosen.items()],
            published=published or marked,
        )
        if runs:
            config = matched(config, next(iter(runs.values())).config, match)
        # Equal names mean equal runs: a full-rank run is not repeated for each rank.
        runs.setdefault(name, SweepRun(name, config, {"method": word, **varied, "seed": seed}))
    return list(runs.values())


def matched(config: TrainConfig, reference: TrainConfig, match: str) -> TrainConfig:
    """The config with as many steps, tokens or trainable parameters as the reference has.

    Raises:
        DynamicsError: an unknown word, or a method that cannot have so many parameters.
    """
    if match not in MATCHES:
        raise DynamicsError(f"match is {match!r}; it must be one of {', '.join(MATCHES)}.")
    if match == "tokens":
        tokens = reference.max_steps * tokens_per_step(reference)
        return replace(config, max_steps=round(tokens / tokens_per_step(config)))
    if match == "trainable_parameters":
        return _with_trainable(config, parameter_counts(reference)[0])
    return config


def tokens_per_step(config: TrainConfig) -> int:
    """Tokens that one optimizer step consumes."""
    return config.sequences_per_step * config.sequence_length


def train_words(preset: str, config: TrainConfig) -> list[str]:
    """The arguments of `train` that give this config: the fields that differ from the preset."""
    base = PRESETS[preset](config.method)
    changed = [
        f"--set={each.name}={setting_text(getattr(config, each.name))}"
        for each in fields(config)
        if getattr(config, each.name) != getattr(base, each.name)
    ]
    return ["train", preset, "--method", config.method, *changed]


def warn_of_schedules(runs: Sequence[SweepRun]) -> None:
    """Give a DifferentSchedulesWarning if the learning rates of two runs differ."""
    first = runs[0]
    for other in runs[1:]:
        step = _first_difference(first.config, other.config)
        if step is not None:
            one, two = (_rate(run.config, step) for run in (first, other))
            warnings.warn(
                f"{first.name} and {other.name} differ in their learning rates, first at step "
                f"{step} ({one:.3g} and {two:.3g}): other differences between them may come from "
                "the learning rates.",
                DifferentSchedulesWarning,
                stacklevel=2,
            )
            return


def _variant(word: str) -> tuple[str, bool]:
    """METHOD or METHOD:as_published -> (the method, whether it is as published)."""
    method, colon, variant = word.partition(":")
    if colon and variant != AS_PUBLISHED:
        raise DynamicsError(
            f"No variant {variant!r} of {method}; write {method}, or {method}:{AS_PUBLISHED}."
        )
    return method, bool(colon)


def _matters(name: str, method: str) -> bool:
    adapted, projected = method in ADAPTED, method in PROJECTED
    if name in RESTART_FIELDS:
        return method == "relora" or (name == "reset_every" and projected)
    if name in PROJECTION_FIELDS:
        return projected
    if name in (*ADAPTER_FIELDS, SCALING):
        scaled = name in ("lora_alpha", SCALING) and method == "sltrain"
        return adapted or scaled
    if name == "lora_rank":
        return adapted or projected or method in FACTORED
    if name == "sparsity":
        return method == "sltrain"
    return name != "target_modules" or method != "full_rank"


def _with_trainable(config: TrainConfig, target: int) -> TrainConfig:
    trainable = parameter_counts(config)[0]
    if trainable == target:
        return config
    if not config.adapted and not config.factored:
        raise DynamicsError(
            f"{config.method} trains {trainable:,} parameters and the first run {target:,}; put "
            "full_rank first, so that the ranks of the other runs are adapted to it."
        )
    # Trainable parameters are linear in the rank.
    per_rank = parameter_counts(replace(config, lora_rank=config.lora_rank + 1))[0] - trainable
    rank = config.lora_rank + round((target - trainable) / per_rank)
    if rank < 1:
        raise DynamicsError(
            f"{config.method} trains more than {target:,} parameters at every rank, because "
            "embeddings, norms and linear layers without an adapter train too; match by tokens or "
            "steps instead."
        )
    return replace(config, lora_rank=rank, lora_alpha=config.scaling * rank)


def _first_difference(one: TrainConfig, other: TrainConfig) -> int | None:
    steps = range(max(one.max_steps, other.max_steps))
    return next((step for step in steps if _rate(one, step) != _rate(other, step)), None)


def _rate(config: TrainConfig, step: int) -> float:
    return config.learning_rate * schedule_of(config)(step)
