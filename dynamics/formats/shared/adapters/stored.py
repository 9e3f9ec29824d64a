"""The parts of adapters among the tensors of a file: to which layer each of them belongs."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from dynamics.formats.storage.tensors import Tensor
from dynamics.runs import parameter_names
from dynamics.runs.stacks import name_in_files

# How the names of parameters begin that PEFT's methods add to a layer: the `prefix` of each tuner.
_METHODS = (
    "adamss", "beft", "bone", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora",
    "gralora", "hada", "hira", "hra", "ia3", "lily", "ln_tuning", "lokr", "lora", "miss", "oft",
    "osf", "peanut", "poly", "psoft", "pvera", "randlora", "road", "shadow", "shira",
    "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora", "vera", "waveft",
)  # fmt: skip
_PEFT_PART = re.compile(rf"(?:{'|'.join(_METHODS)})_\w+")
_LORA_PART = re.compile(
    r"lora_(?:(?:embedding_)?[AB]|magnitude_vector|E)|(?:hada|lokr)_[wt][12]\w*"
)
# How others spell LoRA's A and B: torchtune, loralib and litgpt; kohya, diffusers; relora-pico;
# Megatron Bridge and NeMo.
_OTHER_SPELLINGS = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<one>[ab]|down|up)|(?P<two>[AB])_lora|lora\.(?P<three>[ABab]|down|up)"
    r"|adapter\.linear_(?P<four>in|out))(?:\.(?:default|weight))*"
)
_A, _B = "lora_A", "lora_B"
_CANONICAL = dict.fromkeys(("A", "a", "down", "in"), _A) | dict.fromkeys(
    ("B", "b", "up", "out"), _B
)
BASE_LAYER = ".base_layer"
# Modules that families of models rename in files, and store as they are otherwise.
_STORED_ALIKE = ("router", "lm_head")


@dataclass(frozen=True)
class AdapterLayer:
    """The stored parts of one adapter on one parameter.

    Attributes:
        path: the clean path of the module.
        depth: how many wrappers lie between the module and this one; PEFT wraps a module once for
            each parameter that it adapts.
        parts: "lora_A", "hada_w1_a", ... -> tensor.
        biases: whether the adapter adds to the bias, too.
    """

    path: str
    depth: int = 0
    parts: dict[str, Tensor] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The clean name of the parameter, for messages and where it is the weight."""
        return self.path + ".weight"

    @property
    def method(self) -> str:
        """How its parts are called: "lora", "hada", ..."""
        first = min(self.parts)
        return next(each for each in _METHODS if first.startswith(each + "_"))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it adapts, for the account; that of a part where it is not known."""
        parts = self.parts
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if a in parts and b in parts and parts[b].shape:
                return parts[b].shape[0], prod(parts[a].shape[1:])
        return max((each.shape for each in parts.values()), key=prod)

    def base_in(
        self, weights: Mapping[str, Tensor] | None, config: Mapping[str, Any]
    ) -> tuple[str, Tensor | None]:
        """(Name of the parameter that it adapts, its stored weight, None where there is none).

        Args:
            weights: clean name -> base weight; None where there is no base.
            config: config.json of the model.
        """
        weights = weights or {}
        for name in (self.name, f"{self.path}.in_proj_weight", self.path):
            if name in weights:
                return name, weights[name]
        found = counterpart(self.name, weights, config)
        if found is None:
            return name_in_files(self.name, config), None
        return found, weights[found]


@dataclass(frozen=True)
class StoredAdapters:
    """The adapters in a file.

    Attributes:
        layers: name of the adapter ("" where the file has none) -> its layers.
        shared: name of a part that all layers use (VeRA's projections) -> tensor.
        others: stored name -> tensor of all that is no part of an adapter.
    """

    layers: dict[str, list[AdapterLayer]]
    shared: dict[str, Tensor]
    others: dict[str, Tensor]

    def chosen(self, adapter: str | None) -> str | None:
        """The adapter to read: the one that is named, "default", or the only one; else None."""
        if adapter is not None:
            return adapter if adapter in self.layers else None
        if len(self.layers) == 1:
            return next(iter(self.layers))
        return "default" if "default" in self.layers else None


def stored_adapters(tensors: Mapping[str, Tensor], *, in_model: bool = False) -> StoredAdapters:
    """Sort the tensors of a file into adapters and the rest.

    Args:
        tensors: stored name -> tensor.
        in_model: whether the file holds a whole model, which may have own parameters that are
            called like those of a method of PEFT. Then only wrapped layers have them.
    """
    wrapped = {name.partition(BASE_LAYER)[0] for name in tensors if BASE_LAYER in name}
    layers: dict[str, dict[tuple[str, int], AdapterLayer]] = {}
    shared: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _part(name, wrapped if in_model else None)
        if found is None:
            others[name] = tensor
            continue
        path, part, adapter, leaf = found
        if path == "base_model" or path.endswith(".base_model"):
            shared[part] = tensor
            continue
        depth = 0
        while path.endswith(BASE_LAYER):
            path, depth = path.removesuffix(BASE_LAYER), depth + 1
        clean = parameter_names.clean_name(path + ".weight").removesuffix(".weight")
        of_adapter = layers.setdefault(adapter, {})
        layer = of_adapter.setdefault((clean, depth), AdapterLayer(clean, depth))
        if leaf == "bias":
            layer.biases.append(part)
        else:
            layer.parts[part] = tensor
    for adapter, found_layers in layers.items():
        for key in [key for key, each in found_layers.items() if not each.parts]:
            del layers[adapter][key]
    named = {adapter: list(each.values()) for adapter, each in layers.items() if each}
    return StoredAdapters(named, shared, others)


def counterpart(name: str, names: Collection[str], config: Mapping[str, Any]) -> str | None:
    """The one of several names that stands for the same parameter; None where there is none.

    It is the name itself, or the one that its family gives it in files; for routers and output
    embeddings, also the only one of the same module and layer.

    Args:
        name: the clean name of a live model.
        names: of what is stored.
        config: of the model, as JSON-like values.

    >>> counterpart("model.layers.0.mlp.gate.weight", ["model.layers.0.moe.router.weight"], {})
    'model.layers.0.moe.router.weight'
    """
    for each in (name, name_in_files(name, config)):
        if each in names:
            return each
    if (module := parameter_names.module_of(name)) not in _STORED_ALIKE:
        return None
    layer, stack = parameter_names.layer_of(name), parameter_names.stack_of(name)
    alike = [
        each
        for each in names
        if parameter_names.module_of(each) == module
        and (parameter_names.layer_of(each), parameter_names.stack_of(each)) == (layer, stack)
        and each.endswith(".weight")
    ]
    return alike[0] if len(alike) == 1 else None


def _is_wrapped(path: str, wrapped: set[str]) -> bool:
    """Whether PEFT wraps the module at a path; parts that layers share lie in the model itself."""
    if path == "base_model" or path.endswith(".base_model"):
        return bool(wrapped)
    path = path.partition(BASE_LAYER)[0]
    return path in wrapped or f"{path}.token_adapter" in wrapped


def _part(name: str, wrapped: set[str] | None) -> tuple[str, str, str, str] | None:
    """(Path, part, name of the adapter, leaf) of a tensor that is a part of an adapter."""
    components = name.split(".")
    for index, part in enumerate(components):
        # An embedding's rows are in a wrapper of their own.
        if part == "token_adapter" and components[index + 1 : index + 2] != ["base_layer"]:
            continue
        if not _PEFT_PART.fullmatch(part):
            continue
        path, rest = ".".join(components[:index]).removesuffix(".token_adapter"), components[index:]
        if (
            wrapped is not None
            and not _is_wrapped(path, wrapped)
            and not _LORA_PART.fullmatch(part)
        ):
            continue
        leaf = rest.pop() if len(rest) > 1 and rest[-1] in ("weight", "bias") else ""
        if len(rest) > 2:
            continue
        return path, part, rest[1] if len(rest) > 1 else "", leaf
    if match := _OTHER_SPELLINGS.fullmatch(name):
        spelled = next(match[group] for group in ("one", "two", "three", "four") if match[group])
        return match["path"], _CANONICAL[spelled], "", "weight"
    return None
