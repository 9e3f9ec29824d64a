"""From the layers of an adapter and the base weights to what can be measured of both.

Each layer is decided by itself. What cannot be computed of it is left out by name, with the reason;
the base weight of such a layer is never taken for its weight.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.adapters import experts, fused, lora
from dynamics.formats.shared.adapters.computed import ComputedTensor
from dynamics.formats.shared.adapters.lora import LayerResult
from dynamics.formats.shared.adapters.methods import METHODS, NotComputed, Place, lora_variants
from dynamics.formats.shared.adapters.orientation import Orientations
from dynamics.formats.shared.adapters.scaling import is_number, of_module, scaling
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.shared.matrices import as_matrices
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.account import LeftOut
from dynamics.runs.stacks import parts_of

ORIENTATION = (
    "adapters on square weights that are stored as (in, out) or (out, in), which nothing tells"
)
_MISFIT = "adapters that do not fit the shape of their base weight"
# PEFT before this version took (E, out, in) for (E, in, out).
_SWAPPED_BEFORE = (0, 19, 1)
_EXPERT_OF = re.compile(r"(?:^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class Settings:
    """What is known of an adapter beside its tensors.

    Attributes:
        config: adapter_config.json, or what stands for it.
        model_config: config.json of the model.
        shared: parts that all layers use.
        by_blocks: whether an expert's columns of lora_B lie together.
        no_scale: why the scaling of LoRA is not known, where the config has no alpha.
        scales: path -> alpha of a layer that is stored with it, or its trained scaling.
        hyperparameters: litgpt's, which say what of a fused projection has an adapter.
    """

    config: Mapping[str, Any]
    model_config: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    by_blocks: bool = False
    no_scale: str = ""
    scales: Mapping[str, float | Tensor] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    def scale(self, path: str, rank: int) -> float | Tensor:
        """The scaling of a module, or of a parameter with all experts; a tensor where it trained.

        Raises:
            FormatError: the config has no usable alpha.
            NotComputed: there is no config.
        """
        own = self.scales.get(path)
        if own is not None:
            return own / rank if isinstance(own, float) else own
        if self.no_scale:
            raise NotComputed(self.no_scale)
        return scaling(self.config, path, rank)

    @property
    def swaps_experts(self) -> bool:
        """Whether the version of PEFT took (E, out, in) for (E, in, out)."""
        numbers = str(self.config.get("peft_version") or "0").split("+")[0].split(".")[:3]
        digits = ["".join(filter(str.isdigit, each)) or "0" for each in numbers]
        return tuple(int(each[:9]) for each in digits) < _SWAPPED_BEFORE


@dataclass
class Adapted:
    """What adapters make of a model.

    Attributes:
        weights: clean name -> base weight, without the layers that are left out; None without base.
        adapters: clean name -> s·B·A.
        effective: clean name -> weight that is not base + s·B·A.
        unknown: clean name -> why its weight is not known.
        left_out: the layers that are left out.
        misfits: the layers whose adapter has another shape than the base weight.
    """

    weights: dict[str, Tensor] | None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    effective: dict[str, Tensor] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def leave_out(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        """Leave a parameter out, or only its weight where the adapter is known."""
        stored = (self.weights or {}).get(name)
        self.left_out.append(LeftOut(name, stored.shape if stored else shape, reason))
        self.unknown[name] = reason
        if self.weights is not None:
            self.weights.pop(name, None)


def adapt(
    layers: Sequence[AdapterLayer], weights: Mapping[str, Tensor] | None, settings: Settings
) -> Adapted:
    """Apply the layers of one adapter to the weights of its base model.

    Args:
        layers: the layers.
        weights: clean name -> base weight; None where there is no base.
        settings: what the configs say.
    """
    result = Adapted(None if weights is None else dict(weights))
    orientations = _orientations(layers, weights, settings)
    of_experts: dict[str, list[AdapterLayer]] = {}
    for layer in layers:
        name, base = _base_of(layer, weights)
        if layer.method == "lora" and _is_on_experts(layer, base, weights, settings):
            of_experts.setdefault(layer.path, []).append(layer)
            continue
        try:
            if layer.depth:
                raise NotComputed("several adapters on parameters of one module that is not known")
            found = _apply(layer, name, base, orientations, settings, result)
        except NotComputed as reason:
            result.leave_out(name, _shape(layer), str(reason))
            continue
        except FormatError as problem:
            result.leave_out(name, _shape(layer), str(problem))
            continue
        if found.adapter is not None:
            result.adapters[name] = found.adapter
        if found.base is not None and result.weights is not None:
            result.weights[name] = found.base
        if found.weight is not None:
            result.effective[name] = found.weight
        if found.unknown and weights is not None:
            result.leave_out(name, _shape(layer), found.unknown)
    for path, wrappers in of_experts.items():
        _experts(path, wrappers, weights, settings, result)
    if result.weights is not None:
        _check_shapes(result, settings)
    return result


def _check_shapes(result: Adapted, settings: Settings) -> None:
    """Leave out the weights that an adapter has no base for, or one of another shape."""
    assert result.weights is not None
    stored = as_matrices(result.weights, settings.model_config).matrices
    for name, adapter in result.adapters.items():
        if name in result.unknown:
            continue
        if name not in stored:
            result.leave_out(name, adapter.shape, "adapters without their base weights")
        elif stored[name].shape != adapter.shape:
            shape = stored[name].shape
            result.misfits.append(f"{name} in shape {shape}, but the adapter fits {adapter.shape}")
            result.leave_out(name, shape, _MISFIT)


def _is_on_experts(
    layer: AdapterLayer,
    base: Tensor | None,
    weights: Mapping[str, Tensor] | None,
    settings: Settings,
) -> bool:
    """Whether factors belong to parameters of a module that hold all experts of a layer."""
    a = layer.parts.get("lora_A")
    if a is None or len(a.shape) != 2:
        return False
    if base is not None:
        return len(base.shape) == 3
    names = _parameters(layer.path, weights, settings)
    if names == [layer.name]:  # a matrix that was named as a parameter has factors of one rank
        return a.shape[:1] != (of_module(settings.config, "r", "rank_pattern", layer.name),)
    return bool(names)


def _apply(
    layer: AdapterLayer,
    name: str,
    base: Tensor | None,
    orientations: Orientations,
    settings: Settings,
    result: Adapted,
) -> LayerResult:
    config = settings.config
    if layer.method == "trainable_tokens":
        return _tokens(layer, name, base, config)
    out_in = _out_in(layer, base)
    in_out: bool | None = False
    if layer.method == "lora":
        if (variant := lora.variant(config)) is not None:
            raise NotComputed(f"{variant} adapters, whose weight is more than s·B·A")
        of_parts = _fused(layer, base, settings)
        if of_parts is not None:
            return LayerResult(of_parts, base)
        a, b, is_embedding = lora.factors(layer)
        out_in = b.shape[0], _product(a.shape[1:])
        if base is not None and out_in not in _views(base.shape):
            result.misfits.append(f"{name} in shape {base.shape}, but the adapter fits {out_in}")
            scale = settings.scale(layer.path, a.shape[0])
            # The orientation of what does not fit is that of the config; only W needs it.
            shown = Adapter(a, b, scale, is_embedding or orientations.flag)
            return LayerResult(shown, unknown=_MISFIT)
        if is_embedding:
            in_out = True
        elif len(a.shape) == 2:
            in_out = orientations.is_in_out(
                layer.path, out_in, None if base is None else base.shape
            )
    elif base is not None and out_in is not None:
        in_out = orientations.is_in_out(layer.path, out_in, base.shape)
    if in_out is None:
        raise NotComputed(ORIENTATION)
    if layer.method == "lora":
        return lora.lora_layer(layer, base, settings.scale(layer.path, a.shape[0]), in_out, config)
    method = METHODS.get(layer.method)
    place = Place(layer, base.shape if base is not None else (), in_out, config, settings.shared)
    if method is None:
        raise NotComputed(f"{place.method} adapters, which cannot be computed from their files")
    if base is None:
        raise NotComputed(f"{place.method} adapters without their base weights")
    recipe = method(place)
    return LayerResult(weight=ComputedTensor(name, base, recipe.parts, recipe.formula))


def _fused(layer: AdapterLayer, base: Tensor | None, settings: Settings) -> Adapter | None:
    """The adapter of a fused projection whose parts have factors of their own; None for others."""
    parts = layer.parts
    if not {"lora_A", "lora_B"} <= set(parts) or "lora_magnitude_vector" in parts:
        return None
    a, b = parts["lora_A"], parts["lora_B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or not b.shape[1] or a.shape[0] == b.shape[1]:
        return None
    count, rest = divmod(a.shape[0], b.shape[1])
    if rest or count not in (2, 3) or base is None or base.shape[1:] != a.shape[1:]:
        return None
    rows = base.shape[0]
    found = fused.fused_parts(a, b, rows, settings.model_config, settings.hyperparameters)
    if found is None:
        raise NotComputed(
            "LoRA on some of query, key and value in one matrix: which of them is not known"
        )
    scale = settings.scale(layer.path, b.shape[1])
    return fused.FusedAdapter(a, b, scale, rows=rows, parts=found)


def _tokens(
    layer: AdapterLayer, name: str, base: Tensor | None, config: Mapping[str, Any]
) -> LayerResult:
    given = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(given, Mapping):
        ends = [key for key in given if f".{layer.path}".endswith(f".{key}")]
        given = given[ends[0]] if len(ends) == 1 else None
    rows = layer.parts.get("trainable_tokens_delta")
    if base is None or rows is None or len(base.shape) != 2:
        raise NotComputed("rows of trained tokens without their embedding")
    if (
        not isinstance(given, list)
        or not all(isinstance(each, int) and 0 <= each < base.shape[0] for each in given)
        or rows.shape != (len(given), base.shape[1])
    ):
        raise NotComputed("rows of trained tokens whose indices are not in the config")
    formula = partial(lora_variants.with_rows, rows=tuple(given))
    return LayerResult(weight=ComputedTensor(name, base, {"rows": rows}, formula))


def _experts(
    path: str,
    wrappers: list[AdapterLayer],
    weights: Mapping[str, Tensor] | None,
    settings: Settings,
    result: Adapted,
) -> None:
    """LoRA on parameters that hold all experts; the innermost wrapper is of the first of them."""
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
    shape = _shape(layer)
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


def _base_of(
    layer: AdapterLayer, weights: Mapping[str, Tensor] | None
) -> tuple[str, Tensor | None]:
    """(Name of the parameter that the layer adapts, its stored weight)."""
    for name in (layer.name, f"{layer.path}.in_proj_weight", layer.path):
        if weights is not None and name in weights:
            return name, weights[name]
    return layer.name, None


def _orientations(
    layers: Sequence[AdapterLayer], weights: Mapping[str, Tensor] | None, settings: Settings
) -> Orientations:
    known = []
    for layer in layers:
        _, base = _base_of(layer, weights)
        out_in = _out_in(layer, base)
        if out_in is not None:
            known.append((layer.path, out_in, None if base is None else base.shape))
    return Orientations.of(known, settings.config, settings.model_config)


def _out_in(layer: AdapterLayer, base: Tensor | None) -> tuple[int, int] | None:
    """(out, in) of a linear layer as the parts of its adapter show it; None where they do not."""
    parts = layer.parts
    if {"lora_A", "lora_B"} <= set(parts):
        a, b = parts["lora_A"].shape, parts["lora_B"].shape
        return (b[0], a[1]) if len(a) == len(b) == 2 else None
    if base is None or len(base.shape) != 2:
        return None
    sizes: dict[str, Callable[[], int]] = {
        "vera_lambda_b": lambda: parts["vera_lambda_b"].shape[0],
        "boft_s": lambda: parts["boft_s"].shape[0],
    }
    rows, cols = base.shape
    for part, size in sizes.items():
        if part in parts and parts[part].shape:
            out = size()
            return (out, cols if rows == out else rows)
    scale = parts["ia3_l"].shape if "ia3_l" in parts else ()
    if len(scale) == 2:
        if scale[1] == 1:
            return scale[0], cols if rows == scale[0] else rows
        return rows if cols == scale[1] else cols, scale[1]
    return rows, cols


def _views(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The shapes of products that a weight can be the sum with."""
    flat = shape[0], _product(shape[1:])
    return (flat, flat[::-1]) if len(shape) == 2 else (flat,)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _shape(layer: AdapterLayer) -> tuple[int, ...]:
    """The shape of what a layer adapts, for the account; that of a part where it is not known."""
    parts = layer.parts
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if a in parts and b in parts and parts[b].shape:
            return parts[b].shape[0], _product(parts[a].shape[1:])
    return max((each.shape for each in parts.values()), key=_product)


def names_of(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> set[str]:
    """The names of tensors, and those of the matrices that they are read as."""
    return {*weights, *as_matrices(weights, config).matrices}
