"""Where a recording comes from: the config of the model and the versions of packages."""

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

    This is the `config` of the outermost module that has one, so wrappers (DDP, a
    LightningModule) do not hide it. It may be a Hugging Face config, a dataclass (nanoGPT), or a
    mapping.
    """
    for module in model.modules():
        config = _as_dict(getattr(module, "config", None))
        if config:
            return json.loads(json.dumps(config, default=str))
    return {}


def _as_dict(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return dict(config) if isinstance(config, Mapping) else {}


def package_versions() -> dict[str, str]:
    """Versions of this package, and of imported packages that decide what is recorded."""
    versions = {"learning-dynamics": version("learning-dynamics")}
    for name in _PACKAGES:
        if name in sys.modules:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:  # this module belongs to no installed package
                continue
    return versions
