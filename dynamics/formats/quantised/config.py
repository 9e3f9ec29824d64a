"""What a model's config says about how its weights are quantised."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_KEYS = ("quantization_config", "compression_config")
_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Said:
    """What a config says.

    Attributes:
        method: transformers' `quant_method`: "fp8", "gptq"; "" where the config does not name one.
        config: the whole quantisation config.
        dtype: the dtype that the model computes with, by which dequantised numbers are known.
    """

    method: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The method, for messages."""
        return self.method or "an unknown method"


def said_by(config: Mapping[str, Any] | None) -> Said:
    """What the config of a model, as JSON-like values, says about quantisation.

    >>> said_by({"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}).method
    'fp8'
    """
    config = config if isinstance(config, Mapping) else {}
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else {}
    dtype = "float32"
    for each in (text, config):
        named = str(each.get("dtype") or each.get("torch_dtype") or "").removeprefix("torch.")
        dtype = named if named in _FLOATS else dtype
    given = [each.get(key) for each in (config, text) for key in _KEYS]
    found: Mapping[str, Any] = next((each for each in given if isinstance(each, Mapping)), {})
    method = str(found.get("quant_method") or "").lower()[:40]
    if not method and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if not method and ("config_groups" in found or "format" in found):
        method = "compressed-tensors"
    return Said(method, found, dtype)
