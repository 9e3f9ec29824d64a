"""Which runs a sweep consists of, what they are matched by, and whether their schedules agree."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dynamics.errors import DynamicsError
from probes.relora.config import ADAPTER_FIELDS, RESTART_FIELDS, TrainConfig
from probes.relora.model import parameter_counts
from probes.relora.presets import PRESETS
from probes.relora.settings import SCALING, configured, parse_settings, written
from probes.relora.training.schedule import schedule_of

MATCHES = ("steps", "tokens", "trainable_parameters")
AS_PUBLISHED = "as_published"


class DifferentSchedulesWarning(UserWarning):
    """Runs of a sweep differ in their learning rates too."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its folder: its method and what is varied.
        config: the run.
        varied: field -> value of what is varied, with `method` (the word that it was planned from)
            and `seed`; None for a field that means nothing to the method.
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
    """Every combination of the methods, of the values of each setting, and of the seeds, once.

    Args:
        preset: one of `PRESETS`.
        methods: of `METHODS`; METHOD:as_published is the method with what the published code did
            otherwise, beside others without.
        words: field=value or field=value,value,...; a field with several values is varied.
        seeds: of the runs.
        given: field -> value, None where it was not given, as in `configured`.
        published: as in `configured`, of all methods.
        match: what all runs have as much of as the first one: "steps" leaves them as they are;
            "tokens" sets `max_steps`; "trainable_parameters" sets `lora_rank`, to the nearest, and
            keeps the scaling.

    Raises:
        DynamicsError: see `configured`; or the runs cannot be matched.
    """
    settings = parse_settings(words)
    axes = {name: value.split(",") for name, value in settings.items()}
    rows = itertools.product(*axes.values())
    combinations = [dict(zip(axes, row, strict=True)) for row in rows]
    several = [name for name, values in axes.items() if len(values) > 1]
    runs: dict[str, SweepRun] = {}
    for word, row, seed in itertools.product(methods, combinations, seeds):
        method, marked = _variant(word)
        chosen = {name: value for name, value in row.items() if _matters(name, method)}
        varied = {name: chosen.get(name) for name in several}
        words_of_name = [f"{name}={value}" for name, value in varied.items() if value is not None]
        name = "-".join([word.replace(":", "-"), *words_of_name, f"seed={seed}"]).replace("/", "_")
        config = configured(
            preset,
            method,
            {**(given or {}), "seed": seed},
            [f"{name}={value}" for name, value in chosen.items()],
            published=published or marked,
        )
        if runs:
            config = matched(config, next(iter(runs.values())).config, match)
        # The same name is the same run: a full-rank run need not be repeated for each rank.
        runs.setdefault(name, SweepRun(name, config, {"method": word, **varied, "seed": seed}))
    return list(runs.values())


def matched(config: TrainConfig, reference: TrainConfig, match: str) -> TrainConfig:
    """The config with as many steps, tokens or trainable parameters as the reference.

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
    """The arguments of `train` that give this config: the fields in which it is not the preset."""
    base = PRESETS[preset](config.method)
    changed = [
        f"--set={each.name}={written(getattr(config, each.name))}"
        for each in fields(config)
        if getattr(config, each.name) != getattr(base, each.name)
    ]
    return ["train", preset, "--method", config.method, *changed]


def warn_of_schedules(runs: Sequence[SweepRun]) -> None:
    """A DifferentSchedulesWarning where the learning rates of two runs differ, naming where."""
    first = runs[0]
    for other in runs[1:]:
        step = _first_difference(first.config, other.config)
        if step is not None:
            one, two = (_rate(run.config, step) for run in (first, other))
            warnings.warn(
                f"{first.name} and {other.name} differ in their learning rates, first at step "
                f"{step} ({one:.3g} and {two:.3g}): what else differs between them may come from "
                "there.",
                DifferentSchedulesWarning,
                stacklevel=2,
            )
            return


def _variant(word: str) -> tuple[str, bool]:
    """METHOD or METHOD:as_published -> the method, and whether it is as published."""
    method, colon, variant = word.partition(":")
    if colon and variant != AS_PUBLISHED:
        raise DynamicsError(
            f"No variant {variant!r} of {method}; write {method}, or {method}:{AS_PUBLISHED}."
        )
    return method, bool(colon)


def _matters(name: str, method: str) -> bool:
    if name in RESTART_FIELDS:
        return method == "relora"
    return name not in (*ADAPTER_FIELDS, SCALING) or method != "full_rank"


def _with_trainable(config: TrainConfig, target: int) -> TrainConfig:
    trainable = parameter_counts(config)[0]
    if trainable == target:
        return config
    if not config.adapted:
        raise DynamicsError(
            f"full_rank trains {trainable:,} parameters and the first run {target:,}; put "
            "full_rank first, so that the ranks of the others are set."
        )
    # Trainable parameters are linear in the rank.
    per_rank = parameter_counts(replace(config, lora_rank=config.lora_rank + 1))[0] - trainable
    rank = config.lora_rank + round((target - trainable) / per_rank)
    if rank < 1:
        raise DynamicsError(
            f"{config.method} trains more than {target:,} parameters at every rank: those of "
            "embeddings, norms and linear layers that have no adapter."
        )
    return replace(config, lora_rank=rank, lora_alpha=config.scaling * rank)


def _first_difference(one: TrainConfig, other: TrainConfig) -> int | None:
    steps = range(max(one.max_steps, other.max_steps))
    return next((step for step in steps if _rate(one, step) != _rate(other, step)), None)


def _rate(config: TrainConfig, step: int) -> float:
    return config.learning_rate * schedule_of(config)(step)
