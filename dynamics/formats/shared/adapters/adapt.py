"""From the layers of an adapter and the base weights to what can be measured of both.

Each layer is decided by itself. What cannot be computed of it is left out by name, with the reason;
the base weight of such a layer is never taken for its weight.
"""

from collections.abc import Mapping, Sequence

from dynamics.errors import FormatError
from dynamics.formats.shared.adapters.adapted import Adapted, Settings
from dynamics.formats.shared.adapters.layers import MISFIT, apply_layer
from dynamics.formats.shared.adapters.methods import NotComputed
from dynamics.formats.shared.adapters.on_experts import add_experts, is_on_experts
from dynamics.formats.shared.adapters.orientation import orientations_of
from dynamics.formats.shared.adapters.stored import AdapterLayer
from dynamics.formats.shared.matrices import as_matrices
from dynamics.formats.storage.tensors import Tensor


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
    for layer in layers:
        name, base = layer.base_in(weights)
        if layer.method == "lora" and is_on_experts(layer, base, weights, settings):
            of_experts.setdefault(layer.path, []).append(layer)
            continue
        try:
            if layer.depth:
                raise NotComputed("several adapters on parameters of one module that is not known")
            found = apply_layer(layer, name, base, orientations, settings, result)
        except NotComputed as reason:
            result.leave_out(name, layer.shape, str(reason))
            continue
        except FormatError as problem:
            result.leave_out(name, layer.shape, str(problem))
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
