"""A run's fields from the words of a command line: lora_rank=8, scaling=2, target_modules=all."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynamics.errors import DynamicsError
from probes.relora.config import TARGET_MODULES, TrainConfig
from probes.relora.presets import PRESETS, as_published

# No field of its own: s = lora_alpha / lora_rank, so that a sweep over ranks can keep it.
SCALING = "scaling"
_GROUPS = {
    "all": TARGET_MODULES,
    "attention": TARGET_MODULES[:4],
    "swiglu": TARGET_MODULES[4:],
}


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """`name=value` words -> name -> value, as they were written.

    Raises:
        DynamicsError: a word without "=", a field twice, or one that no run has.
    """
    settings: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise DynamicsError(f"--set takes field=value; found {word!r}.")
        if name in settings:
            raise DynamicsError(f"--set {name} is given twice; give it once.")
        if name not in _fields():
            raise DynamicsError(f"No field {name!r}; known: {', '.join(_fields())}.")
        settings[name] = value
    return settings


def with_settings(config: TrainConfig, settings: Mapping[str, str]) -> TrainConfig:
    """The config with these fields, each parsed as its type.

    `target_modules` takes names joined by +, or all, attention or swiglu; `scaling` sets
    `lora_alpha` to that many times the rank; none is None where a field may be None.

    Raises:
        DynamicsError: a value that its field cannot be.
    """
    values = {name: _parse(name, word) for name, word in settings.items()}
    scaling = values.pop(SCALING, None)
    if scaling is not None:
        if "lora_alpha" in values:
            raise DynamicsError("scaling is lora_alpha / lora_rank; set one of the two.")
        values["lora_alpha"] = scaling * values.get("lora_rank", config.lora_rank)
    return replace(config, **values)


def written(value: Any) -> str:
    """A field's value as `with_settings` reads it."""
    if isinstance(value, tuple):
        return "+".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def configured(
    preset: str,
    method: str,
    given: Mapping[str, Any],
    words: Sequence[str],
    *,
    published: bool = False,
) -> TrainConfig:
    """The config of a preset and method with what a command line gives beside them.

    Args:
        preset: one of `PRESETS`.
        method: of the run.
        given: field -> value, None where it was not given.
        words: field=value, which take precedence.
        published: with what the published code did otherwise, see `as_published`.

    Raises:
        DynamicsError: an unknown preset or field, or a value that cannot be.
    """
    if preset not in PRESETS:
        raise DynamicsError(f"No preset {preset!r}; known: {', '.join(PRESETS)}.")
    config = PRESETS[preset](method)
    if published:
        config = as_published(config)
    stated = {name: str(value) for name, value in given.items() if value is not None}
    return with_settings(config, stated | parse_settings(words))


def _fields() -> dict[str, Any]:
    return {**typing.get_type_hints(TrainConfig), SCALING: float}


def _parse(name: str, word: str) -> Any:
    kind = _fields()[name]
    if isinstance(kind, types.UnionType):  # str | None
        return None if word.lower() == "none" else word
    if kind is bool:
        known = {"true": True, "false": False}
        if word.lower() not in known:
            raise DynamicsError(f"{name} is {word!r}; it must be true or false.")
        return known[word.lower()]
    if typing.get_origin(kind) is tuple:
        return _GROUPS.get(word) or tuple(word.split("+"))
    try:
        return kind(word)
    except ValueError:
        raise DynamicsError(
            f"{name} is {word!r}; it must be a number of type {kind.__name__}."
        ) from None
