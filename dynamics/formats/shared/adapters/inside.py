"""Adapters inside the state dict of a whole model, in whatever file it lies.

The base weight has a name of its own there ("base_layer", litgpt's "linear"), or that of the weight
(torchtune, loralib). It is never taken for the weight.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.format import OpenOptions
from dynamics.formats.shared.adapters.adapt import adapt
from dynamics.formats.shared.adapters.adapted import Adapted, Settings
from dynamics.formats.shared.adapters.beside import adapter_config
from dynamics.formats.shared.adapters.stored import AdapterLayer, StoredAdapters, stored_adapters
from dynamics.formats.storage.tensors import Tensor, UnreadTensor
from dynamics.runs import parameter_names
from dynamics.runs.account import LeftOut

NO_SCALE = (
    "LoRA layers whose scaling is not known: give their alpha with lora_alpha= (--lora-alpha), or "
    "put adapter_config.json beside them"
)
NO_BASE = (
    "{where} holds the factors of LoRA without the base weights; measure the adapter alone with "
    "kinds=['adapter'] (--kinds adapter), or save it with PEFT beside its base model."
)
_WRAPPED = re.compile(r"(?:\.token_adapter)?(?:\.base_layer)+\.")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
_ORIGINAL = re.compile(r"(?P<path>.+)\.original_module\.(?P<leaf>.+)")
# What litgpt, and Megatron Bridge and NeMo call the layer that they wrap.
_INNER = re.compile(r"(?P<path>.+)\.(?:linear|to_wrap)\.(?P<leaf>weight|bias)")
_SIGN = re.compile(r"lora|\.base_layer\.|\.modules_to_save\.|\.adapter\.linear_", re.IGNORECASE)
# Numbers and vectors of one layer that other tools store beside the factors.
_ALPHA, _TRAINED_SCALES, _MAGNITUDE = "alpha", ("scaling", "s"), "magnitude"


@dataclass(frozen=True)
class Inside:
    """What the state dict of a model with adapters holds.

    Attributes:
        adapted: what the adapters make of the weights.
        no_scale: why the scaling of LoRA is not known, "" where it is.
        no_base: why there is no base weight, "" where there is.
        config: what stands for adapter_config.json.
        left_out: what was not read and is no part of an adapter, by clean names.
    """

    adapted: Adapted
    no_scale: str
    no_base: str
    config: Mapping[str, Any]
    left_out: tuple[LeftOut, ...]


def may_hold_adapters(names: Iterable[str]) -> bool:
    """Whether names are those of a model with adapters; without a look at the tensors."""
    return any(_SIGN.search(name) for name in names)


def adapters_inside(
    tensors: Mapping[str, Tensor],
    not_read: Sequence[LeftOut],
    where: Path,
    root: Path,
    attrs: Mapping[str, Any],
    options: OpenOptions,
    as_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Inside | None:
    """The adapters in a state dict, applied to its weights; None where there are none.

    Args:
        tensors: stored name -> tensor.
        not_read: the other tensors; some may be parts of adapters.
        where: the checkpoint.
        root: the directory that no file may lie out of.
        attrs: what the checkpoint says of its model.
        options: what the user said.
        as_weights: gives the weights of a model clean names, each tied one once.

    Raises:
        FormatError: the adapter that the user chose is not there, or a config is damaged.
    """
    unread = {each.name: UnreadTensor(each.shape, each.reason) for each in not_read}
    stored = stored_adapters({**tensors, **unread}, in_model=True)
    left_out = [each for each in not_read if stored.others.pop(each.name, None) is not None]
    if not stored.layers and not any(_SAVED.fullmatch(name) for name in stored.others):
        return None
    chosen = stored.chosen(options.adapter)
    if options.adapter is not None and chosen is None:
        known = ", ".join(sorted(stored.layers)) or "none"
        raise FormatError(f"{where} has no adapter {options.adapter!r}; it has {known}.")
    config, hyper = adapter_config(where, root, attrs, chosen or "")
    if options.lora_alpha is not None:
        config = {**config, "lora_alpha": options.lora_alpha, "alpha_pattern": {}}
    # The base weights in the file are what the initialisation left of them.
    config = {key: value for key, value in config.items() if key != "init_lora_weights"}
    layers = stored.layers.get(chosen, []) if chosen is not None else []
    others = _plain_names(stored, chosen)
    model_config = attrs.get("config")
    settings = Settings(
        config,
        {**hyper, **(model_config if isinstance(model_config, Mapping) else {})},
        stored.shared,
        bool(options.expert_blocks),
        no_scale="" if "lora_alpha" in config else NO_SCALE,
        scales=_scales(layers, others),
        hyperparameters=hyper,
    )
    weights = as_weights(others)
    has_base = any(_has_base(layer, weights) for layer in layers) or not layers
    adapted = adapt(layers, weights if has_base else None, settings)
    if chosen is None:
        _leave_out_all(stored, adapted)
    unscaled = any(NO_SCALE in each.reason for each in adapted.left_out)
    return Inside(
        adapted,
        f"{where} holds {NO_SCALE}." if unscaled else "",
        "" if has_base else NO_BASE.format(where=where),
        config,
        with_clean_names_left_out(left_out),
    )


def _plain_names(stored: StoredAdapters, adapter: str | None) -> dict[str, Tensor]:
    """Name -> tensor of all that is no part of an adapter, without the names of wrappers."""
    paths = {layer.path for layers in stored.layers.values() for layer in layers}
    copies = {match["adapter"] for name in stored.others if (match := _SAVED.fullmatch(name))}
    active = adapter if adapter in copies or len(copies) != 1 else next(iter(copies))
    plain: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in stored.others.items():
        if match := _SAVED.fullmatch(name):
            if match["adapter"] == active:
                saved[f"{match['path']}.{match['leaf']}"] = tensor
            continue
        if (match := _ORIGINAL.fullmatch(name)) or (
            (match := _INNER.fullmatch(name)) and _clean(match["path"]) in paths
        ):
            name = f"{match['path']}.{match['leaf']}"
        plain[_WRAPPED.sub(".", name)] = tensor
    clean = {parameter_names.clean_name(name) for name in saved}
    kept = {n: each for n, each in plain.items() if parameter_names.clean_name(n) not in clean}
    # What other tools store beside the factors is a part of the adapter.
    by_layer = {
        f"{layer.path}.{_MAGNITUDE}": layer for layers in stored.layers.values() for layer in layers
    }
    for name in [*kept]:
        layer = by_layer.get(parameter_names.clean_name(name))
        if layer is not None:
            layer.parts["lora_magnitude_vector"] = kept.pop(name)
    return kept | saved


def _scales(layers: list[AdapterLayer], others: dict[str, Tensor]) -> dict[str, float | Tensor]:
    """Path -> alpha that is stored beside the factors as a number, or the trained scaling itself.

    What is found is taken out of `others`.
    """
    by_name = {parameter_names.clean_name(name): name for name in others}
    scales: dict[str, float | Tensor] = {}
    for layer in layers:
        for leaf in (_ALPHA, *_TRAINED_SCALES):
            name = by_name.get(f"{layer.path}.{leaf}")
            if name is None or any(size != 1 for size in others[name].shape):
                continue
            tensor = others.pop(name)
            scales[layer.path] = float(tensor.read().reshape(-1)[0]) if leaf == _ALPHA else tensor
    return scales


def _has_base(layer: AdapterLayer, weights: Mapping[str, Tensor]) -> bool:
    own = (layer.name, layer.path, f"{layer.path}.in_proj_weight")
    return any(name in weights for name in own) or any(
        name.startswith(f"{layer.path}.") for name in weights
    )


def _leave_out_all(stored: StoredAdapters, adapted: Adapted) -> None:
    """Leave out the layers of several adapters of which none is chosen."""
    names = ", ".join(sorted(stored.layers))
    reason = f"LoRA layers of several adapters ({names}): choose one with adapter= (--adapter)"
    for layers in stored.layers.values():
        for layer in layers:
            if layer.name not in adapted.unknown:
                shape = max((each.shape for each in layer.parts.values()), key=len)
                adapted.leave_out(layer.name, shape, reason)


def _clean(path: str) -> str:
    return parameter_names.clean_name(path + ".weight").removesuffix(".weight")


def with_clean_names_left_out(left_out: Iterable[LeftOut]) -> tuple[LeftOut, ...]:
    """What is left out, by clean names."""
    return tuple(
        replace(each, name=parameter_names.clean_name(_WRAPPED.sub(".", each.name)))
        for each in left_out
    )
