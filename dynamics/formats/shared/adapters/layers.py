"""What an adapter makes of one layer: its method, and whether it fits the base weight."""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

from dynamics.formats.shared.adapters import fused, lora
from dynamics.formats.shared.adapters.adapted import Adapted, Settings
from dynamics.formats.shared.adapters.computed import ComputedTensor
from dynamics.formats.shared.adapters.lora import LayerResult
from dynamics.formats.shared.adapters.methods import METHODS, NotComputed, Place, lora_variants
from dynamics.formats.shared.adapters.orientation import Orientations, out_in_of
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.shared.lora_factors import Adapter
from dynamics.formats.shared.sparse_low_rank import SparseTensor
from dynamics.formats.storage.tensors import Tensor

ORIENTATION = (
    "adapters on square weights that are stored as (in, out) or (out, in), which nothing tells"
)
MISFIT = "adapters that do not fit the shape of their base weight"


def apply_layer(
    layer: AdapterLayer,
    name: str,
    base: Tensor | None,
    orientations: Orientations,
    settings: Settings,
    result: Adapted,
) -> LayerResult:
    """What the adapter makes of a layer that is no stack of experts.

    Args:
        layer: its parts.
        name: of the parameter that it adapts.
        base: the stored weight of it, None where there is none.
        orientations: those of all layers.
        settings: what the configs say.
        result: gets a layer that does not fit its base weight as a misfit.

    Raises:
        NotComputed: nothing can be measured of the layer.
        FormatError: the config has no usable alpha.
    """
    config = settings.config
    if layer.method == "trainable_tokens":
        return _tokens(layer, name, base, config)
    out_in = out_in_of(layer, base)
    in_out: bool | None = False
    if layer.method == "lora":
        if (variant := lora.variant(config)) is not None:
            raise NotComputed(f"{variant} adapters, whose weight is more than s·B·A")
        of_parts = _fused(layer, base, settings)
        if of_parts is not None:
            return LayerResult(of_parts, base)
        a, b, is_embedding = lora.factors(layer)
        out_in = b.shape[0], prod(a.shape[1:])
        if base is not None and out_in not in _views(base.shape):
            result.misfits.append(f"{name} in shape {base.shape}, but the adapter fits {out_in}")
            scale = settings.scale(layer.path, a.shape[0])
            # The orientation of what does not fit is that of the config; only W needs it.
            shown = Adapter(a, b, scale, is_embedding or orientations.flag)
            return LayerResult(shown, unknown=MISFIT)
        if is_embedding:
            in_out = True
        elif isinstance(base, SparseTensor):
            in_out = False
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


def _views(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The shapes of products that a weight can be the sum with."""
    flat = shape[0], prod(shape[1:])
    return (flat, flat[::-1]) if len(shape) == 2 else (flat,)
