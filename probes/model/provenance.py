"""What a recording says about its origin: the model's config and the versions of packages."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "lightning", "zarr")


def model_config(model: nn.Module) -> dict[str, Any]:
    """The config of a model as JSON-like values; {} where it has none.

    It is the `config` of the outermost module that has one, so that wrappers (DDP, a
    LightningModule) do not hide it: Hugging Face's, a dataclass as nanoGPT's, or a mapping.
    """
    for module in model.modules():
        found = _as_dict(getattr(module, "config", None))
        if found:
            return json.loads(json.dumps(found, default=str))
    return {}


def _as_dict(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return dict(config) if isinstance(config, Mapping) else {}


def package_versions() -> dict[str, str]:
    """Versions of this package and of those in use that decide what is computed and written."""
    found = {"learning-dynamics": version("learning-dynamics")}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # a module of that name which no package brought
                continue
    return found
