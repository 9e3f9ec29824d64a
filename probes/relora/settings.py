"""The config of a run from words such as lora_rank=8, scaling=2, target_modules=all."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dynamics.errors import DynamicsError
from probes.relora.config import TARGET_MODULES, TrainConfig
from probes.relora.presets import PRESETS, as_published

# Not a field: s = lora_alpha / lora_rank. With it, a sweep over ranks can keep s.
SCALING = "scaling"
_GROUPS = {
    "all": TARGET_MODULES,
    "attention": TARGET_MODULES[:4],
    "swiglu": TARGET_MODULES[4:],
}


def parse_settings(words: Sequence[str]) -> dict[str, str]:
    """Words `name=value` -> a dict name -> value, with values as text.

    Raises:
        DynamicsError: a word without "=", a field that is given twice, or an unknown field.
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
    """The config with these fields changed; each value is parsed as the type of its field.

    `target_modules` takes names joined by +, or all, attention or swiglu. `scaling` sets
    `lora_alpha` to that many times the rank. `none` means None where a field may be None.

    Raises:
        DynamicsError: a value that its field cannot have.
    """
    values = {name: _parse(name, word) for name, word in settings.items()}
    scaling = values.pop(SCALING, None)
    if scaling is not None:
        if "lora_alpha" in values:
            raise DynamicsError("scaling is lora_alpha / lora_rank; set one of the two.")
        values["lora_alpha"] = scaling * values.get("lora_rank", config.lora_rank)
    return replace(config, **values)


def setting_text(value: Any) -> str:
    """The value of a field as `with_settings` reads it."""
    if isinstance(value, tuple):
        return "+".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def config_from_words(
    preset: str,
    method: str,
    given: Mapping[str, Any],
    words: Sequence[str],
    *,
    published: bool = False,
) -> TrainConfig:
    """The config of a preset and a method, with fields changed by a command line.

    Args:
        preset: one of `PRESETS`.
        method: one of `METHODS`.
        given: field -> value; None if the command line does not give it.
        words: field=value; they take precedence over `given`.
        published: with the defects of the published code, see `as_published`.

    Raises:
        DynamicsError: an unknown preset or field, or a value that its field cannot have.
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
