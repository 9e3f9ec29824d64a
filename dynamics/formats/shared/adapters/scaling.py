"""The scaling of an adapter on one layer: alpha, the rank, and what a config says of both."""

import math
import re
from collections.abc import Mapping
from typing import Any

from dynamics.errors import FormatError

CONFIG = "adapter_config.json"


def is_number(value: Any) -> bool:
    """Whether a value of a config is a finite number."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 2**1000
        and math.isfinite(value)
    )


def of_module(config: Mapping[str, Any], field: str, patterns: str, module: str) -> Any:
    """A field of adapter_config.json, or the value that a pattern gives for a module.

    Args:
        config: adapter_config.json.
        field: "lora_alpha", "alpha" or "r".
        patterns: "alpha_pattern" or "rank_pattern": its keys are regular expressions, which match
            modules whose path ends so, as in PEFT's `get_pattern_key`.
        module: the module's path.

    Raises:
        FormatError: the patterns are no such patterns.
    """
    given = config.get(patterns) or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"{CONFIG} has {patterns} {given!r}, expected an object.")
    for pattern, value in given.items():
        try:
            match = re.match(rf"(?:.*\.)?(?:{pattern})$", module)
        except re.error as error:
            raise FormatError(
                f"{CONFIG} has the {patterns} {pattern!r}, not a regular expression: {error}."
            ) from error
        if match:
            return value
    return config.get(field)


def scaling(
    config: Mapping[str, Any], module: str, rank: int, *, field: str = "lora_alpha"
) -> float:
    """The scaling s of a module: alpha/r, or alpha/sqrt(r) where `use_rslora` is set.

    Args:
        config: adapter_config.json.
        module: the module's path.
        rank: r of the stored factors; `rank_pattern` had its effect when they were made.
        field: what alpha is called.

    Raises:
        FormatError: the config has no usable alpha.

    Example:
        >>> from dynamics.formats.shared.adapters.scaling import scaling
        >>> scaling({"lora_alpha": 16, "alpha_pattern": {"up_proj": 4}}, "mlp.up_proj", 8)
        0.5
    """
    alpha = of_module(config, field, "alpha_pattern", module)
    if not is_number(alpha):
        raise FormatError(f"{CONFIG} has {field} {alpha!r} for {module}, expected a number.")
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
