"""LoRA on the parameters of a module that hold all experts of a layer: which factors are whose.

PEFT wraps the module once for each parameter, and does not say in the file which one it is.
"""

import re
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.adapters import experts, lora
from dynamics.formats.shared.adapters.adapted import Adapted, Settings
from dynamics.formats.shared.adapters.methods import NotComputed
from dynamics.formats.shared.adapters.scaling import is_number, of_module
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.stacks import parts_of

_EXPERT_OF = re.compile(r"(?:^|\.)experts\.\d+\.")


def is_on_experts(
    layer: AdapterLayer,
    base: Tensor | None,
    weights: Mapping[str, Tensor] | None,
    settings: Settings,
) -> bool:
    """Whether factors belong to parameters of a module that hold all experts of a layer.

    Args:
        layer: the factors.
        base: the stored weight of the layer, None where there is none.
        weights: clean name -> base weight; None where there is no base.
        settings: what the configs say.
    """
    a = layer.parts.get("lora_A")
    if a is None or len(a.shape) != 2:
        return False
    if base is not None:
        return len(base.shape) == 3
    names = _parameters(layer.path, weights, settings)
    if names == [layer.name]:  # a matrix that was named as a parameter has factors of one rank
        return a.shape[:1] != (of_module(settings.config, "r", "rank_pattern", layer.name),)
    return bool(names)


def add_experts(
    path: str,
    wrappers: list[AdapterLayer],
    weights: Mapping[str, Tensor] | None,
    settings: Settings,
    result: Adapted,
) -> None:
    """Add what LoRA on parameters that hold all experts makes of them to a result.

    Args:
        path: of the module whose parameters they are.
        wrappers: one for each parameter that is adapted; the innermost is of the first of them.
        weights: clean name -> base weight; None where there is no base.
        settings: what the configs say.
        result: gets the adapters, and what is left out.
    """
    names = _parameters(path, weights, settings)
    wrappers = sorted(wrappers, key=lambda each: -each.depth)
    try:
        names = _fitting(names, wrappers, weights)
        if len(names) != len(wrappers):
            raise NotComputed("LoRA on parameters of one module, which the config does not name")
        if (variant := lora.variant(settings.config)) is not None:
            raise NotComputed(f"{variant} adapters, whose weight is more than s·B·A")
        for name, layer in zip(names, wrappers, strict=True):
            result.adapters |= _of_experts(name, layer, weights, settings)
    except (NotComputed, FormatError) as reason:
        for name in names or [path]:
            _leave_out_experts(name, wrappers[0], str(reason), settings, result)


def _fitting(
    names: list[str], wrappers: list[AdapterLayer], weights: Mapping[str, Tensor] | None
) -> list[str]:
    """Of more parameters than have an adapter, those that fit; all where several ways do."""
    if weights is None or len(names) <= len(wrappers):
        return names

    def fits(name: str, layer: AdapterLayer) -> bool:
        a, b, _ = lora.factors(layer)
        shape = weights[name].shape if name in weights else ()
        return sorted(shape[1:]) == sorted((b.shape[0], a.shape[1]))

    ways = [
        list(way)
        for way in combinations(names, len(wrappers))
        if all(fits(name, layer) for name, layer in zip(way, wrappers, strict=True))
    ]
    return ways[0] if len(ways) == 1 else names


def _of_experts(
    name: str,
    layer: AdapterLayer,
    weights: Mapping[str, Tensor] | None,
    settings: Settings,
) -> Mapping[str, Adapter]:
    a, b, _ = lora.factors(layer)
    stored = (weights or {}).get(name)
    shape = stored.shape if stored is not None else ()
    if len(shape) == 3:
        rank, rest = divmod(a.shape[0], shape[0])
    else:
        given = of_module(settings.config, "r", "rank_pattern", name)
        if not is_number(given) or given < 1:
            raise NotComputed("LoRA on experts whose rank is not known")
        rank, rest = int(given), a.shape[0] % int(given)
    if rest or not rank:
        raise NotComputed("LoRA factors on experts whose number is not that of the model")
    config, is_old = settings.model_config, settings.swaps_experts
    if len(shape) != 3:
        shape = experts.parameter_shape(a.shape, b.shape, a.shape[0] // rank, config, is_old)
        shape = _shape_of_stored(name, shape, weights, config) or shape
    found = experts.expert_adapters(
        name, a, b, settings.scale(name, rank), shape, config,
        is_old=is_old, by_blocks=settings.by_blocks,
    )  # fmt: skip
    if isinstance(found, str):
        raise NotComputed(found)
    return found


def _shape_of_stored(
    name: str,
    shape: tuple[int, ...],
    weights: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
) -> tuple[int, ...] | None:
    """`shape`, or `shape` turned: that of a parameter whose experts are stored one by one."""
    for each in (shape, (shape[0], shape[2], shape[1])):
        parts = parts_of(name, each, config)
        if weights is None or isinstance(parts, str):
            continue
        stored = [weights.get(part.name) for part in parts]
        if all(
            tensor is not None and tensor.shape == (part.rows, part.cols)
            for tensor, part in zip(stored, parts, strict=True)
        ):
            return each
    return None


def _leave_out_experts(
    name: str, layer: AdapterLayer, reason: str, settings: Settings, result: Adapted
) -> None:
    """Leave out the parameter, or its experts where they are stored one by one."""
    shape = layer.shape
    stored = [each for each in result.weights or {} if _EXPERT_OF.search(each)]
    rows = settings.model_config.get("num_local_experts") or settings.model_config.get(
        "num_experts"
    )
    guessed = (rows if isinstance(rows, int) and 0 < rows < 2**16 else 1, *shape)
    parts = parts_of(name, guessed, settings.model_config)
    names = [] if isinstance(parts, str) else [each.name for each in parts if each.name in stored]
    for each in names or [name]:
        result.leave_out(each, shape, reason)


def _parameters(path: str, weights: Mapping[str, Tensor] | None, settings: Settings) -> list[str]:
    """The parameters of a module that its adapters belong to, in the module's own order."""
    targets = settings.config.get("target_parameters")
    stored = [
        name
        for name, tensor in (weights or {}).items()
        if name.rpartition(".")[0] == path and len(tensor.shape) == 3
    ]
    if not isinstance(targets, list) or not targets:
        return stored
    wanted = [each for each in targets if isinstance(each, str)]

    def is_target(name: str) -> bool:
        return any(name == each or name.endswith(f".{each}") for each in wanted)

    if found := [name for name in stored if is_target(name)]:
        return sorted(found, key=_own_order)
    leaves = dict.fromkeys(each.rpartition(".")[2] for each in wanted)
    return sorted(
        (f"{path}.{leaf}" for leaf in leaves if is_target(f"{path}.{leaf}")), key=_own_order
    )


def _own_order(name: str) -> tuple[bool, bool, str]:
    """Families define what leads into an expert before what leads out of it."""
    leaf = name.rpartition(".")[2]
    return (
        "down" in leaf or "output" in leaf or leaf == "w2",
        "up" in leaf and "gate" not in leaf,
        leaf,
    )
