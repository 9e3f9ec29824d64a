"""From the layers of an adapter and the base weights to what can be measured of both.

Each layer is decided by itself. What cannot be computed of it is left out by name, with the reason;
the base weight of such a layer is never taken for its weight.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from dynamics.errors import FormatError
from dynamics.formats.shared.adapters.adapted import Adapted, Settings
from dynamics.formats.shared.adapters.layers import MISFIT, apply_layer
from dynamics.formats.shared.adapters.methods import METHODS, NotComputed
from dynamics.formats.shared.adapters.on_experts import add_experts, is_on_experts
from dynamics.formats.shared.adapters.orientation import orientations_of
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.shared.matrices import as_matrices
from dynamics.formats.storage.tensors import ITEM_BYTES, Tensor, UnreadTensor
from dynamics.runs.stacks import name_in_files


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
    orientations = orientations_of(layers, weights, settings.config, settings.model_config)
    of_experts: dict[str, list[AdapterLayer]] = {}
    leave_out = partial(_leave_out, weights=weights, settings=settings, result=result)
    for layer in layers:
        name, base = layer.base_in(weights, settings.model_config)
        if unread := _unread_part(layer, settings.shared):
            leave_out(layer, name, unread)
            continue
        if layer.method == "lora" and is_on_experts(layer, base, weights, settings):
            of_experts.setdefault(layer.path, []).append(layer)
            continue
        try:
            if layer.depth or _matrices_inside(layer, name, weights, settings):
                raise NotComputed("adapters on parameters of a module that are not known")
            found = apply_layer(layer, name, base, orientations, settings, result)
        except NotComputed as reason:
            leave_out(layer, name, str(reason))
            continue
        except FormatError as problem:
            leave_out(layer, name, str(problem))
            continue
        if found.adapter is not None:
            result.adapters[name] = found.adapter
        if found.base is not None and result.weights is not None:
            result.weights[name] = found.base
        if found.weight is not None:
            result.effective[name] = found.weight
        if found.unknown and weights is not None:
            result.leave_out(name, layer.shape, found.unknown)
    for path, wrappers in of_experts.items():
        add_experts(path, wrappers, weights, settings, result)
    if result.weights is not None:
        _check_shapes(result, settings)
    return result


def _leave_out(
    layer: AdapterLayer,
    name: str,
    reason: str,
    weights: Mapping[str, Tensor] | None,
    settings: Settings,
    result: Adapted,
) -> None:
    """Leave a layer out; where it wraps a module with several matrices, all of them."""
    for each in _matrices_inside(layer, name, weights, settings) or (name,):
        if each not in result.unknown:
            result.leave_out(each, layer.shape, reason)


def _matrices_inside(
    layer: AdapterLayer, name: str, weights: Mapping[str, Tensor] | None, settings: Settings
) -> list[str]:
    """The stored matrices of a module that a layer wraps and that has no weight of its own."""
    if weights is None or name in weights:
        return []
    paths = (f"{layer.path}.", name_in_files(f"{layer.path}.", settings.model_config))
    return [each for each in weights if each.startswith(paths) and len(weights[each].shape) > 1]


def _unread_part(layer: AdapterLayer, shared: Mapping[str, Tensor]) -> str:
    """Why a part of a layer cannot be read as numbers; empty where all can, or are not to be."""
    if layer.method not in (*METHODS, "lora", "trainable_tokens"):
        return ""
    for part, tensor in (*layer.parts.items(), *shared.items()):
        if isinstance(tensor, UnreadTensor):
            return f"adapters with {tensor.reason} ({part})"
        if tensor.dtype not in ITEM_BYTES:
            return f"adapters with numbers of the dtype {tensor.dtype} ({part})"
    return ""


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
            result.leave_out(name, shape, MISFIT)
