"""What a recording comes from: the configs of model and training, and versions of packages."""

import dataclasses
import enum
import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

_NOTHING = object()
_SECRET = ("token", "secret", "password", "key")
_PLACES = {"output_dir", "logging_dir", "run_name", "hub_model_id", "resume_from_checkpoint"}
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


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """{"adapter_config": the config of PEFT's active adapter}; {} where the model has none."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping) and configs:
            active = getattr(module, "active_adapter", None)
            name = active[0] if isinstance(active, list) and active else active
            chosen = configs[name] if name in configs else next(iter(configs.values()))
            return {"adapter_config": settings(_as_dict(chosen))}
    return {}


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among arguments of a training, JSON-like.

    What may be a secret is left out: texts under names with "token", "secret", "password" or
    "key", URLs with credentials. So are paths where a run is written, and objects such as modules.
    """
    return {
        str(name): plain
        for name, value in values.items()
        if name not in _PLACES
        and not (isinstance(value, str) and any(word in name.lower() for word in _SECRET))
        and (plain := _plain(value)) is not _NOTHING
    }


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, str):
        return _NOTHING if re.search(r"://[^/]*@", value) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return settings(value)
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [each for each in map(_plain, value) if each is not _NOTHING]
    return _NOTHING


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
