"""Layers of LoRA: the weight that they compute with, and their factors.

Only plain LoRA is here: W + s·B·A. For its variants (DoRA, ...) see `adapters`.
"""

from typing import Any, cast

import torch
from torch import nn

from probes.model.twin import whole
from probes.model.weight import Factors

# Variants that differ from plain LoRA only in how they are trained.
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant")


def is_plain_lora(layer: Any) -> bool:
    """Whether each active adapter of a layer of PEFT adds s·B·A to the weight, and nothing else."""
    return _is_lora(layer) and not any(
        each in layer.lora_variant for each in active_adapters(layer)
    )


def has_factors(layer: Any) -> bool:
    """Whether each active adapter of a layer of PEFT is s·B·A, however it is trained."""
    if not _is_lora(layer):
        return False
    variants = [layer.lora_variant.get(each) for each in active_adapters(layer)]
    return all(each is None or type(each).__name__ in _PLAIN_VARIANTS for each in variants)


def active_adapters(layer: Any) -> list[str]:
    """The active adapters that the layer of LoRA has, even if they are merged or disabled."""
    known = (*layer.lora_A, *layer.lora_embedding_A)
    return [adapter for adapter in layer.active_adapters if adapter in known]


def adapted_weight_name(layer: Any) -> str:
    """The name, inside of the base layer, of the weight that a layer of PEFT adapts."""
    return str(getattr(layer, "parameter_name", "weight"))  # target_parameters of LoraConfig


def added(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """The base weight of a plain LoRA layer with its adapters, rounded where merging rounds.

    The sum has the dtype of the base weight, as for a merge. A quantised base is unpacked, and the
    sum is not packed again: it is what the layer computes with. On float8 numbers it is float32.

    Args:
        layer: the layer, whose adapters are added unless they are merged or disabled.
        weight: its base weight, which is not changed.
    """
    if layer.merged != layer.disable_adapters:
        return weight
    # A layer that is merged and disabled takes the adapters out again when it computes.
    adapters = layer.merged_adapters[::-1] if layer.merged else active_adapters(layer)
    if adapters:
        weight = weight.float() if weight.dtype.itemsize == 1 else weight.clone()  # float8
    for adapter in adapters:
        weight.add_(_delta(layer, adapter, weight.dtype), alpha=-1 if layer.merged else 1)
    return weight


def _delta(layer: Any, adapter: str, dtype: torch.dtype) -> torch.Tensor:
    if not hasattr(layer, "get_delta_weight"):  # layers that cannot merge: GPTQ, AWQ, ...
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return cast(torch.Tensor, (b @ a) * layer.scaling[adapter])
    delta: torch.Tensor = layer.get_delta_weight(adapter)
    return delta.to(dtype) if adapter in layer.lora_embedding_A else delta


def active_factors(layer: Any) -> Factors | None:
    """The factors of the one adapter that a LoRA layer adds; None if there are none or several."""
    adapters = active_adapters(layer)
    if layer.merged or layer.disable_adapters or len(adapters) != 1:
        return None
    return factors_of(layer, adapters[0])


def factors_of(layer: Any, adapter: str) -> Factors | None:
    """The factors of one adapter of a plain LoRA layer; None if they are no A and B of a matrix."""
    scaling = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return Factors(a.detach(), b.detach(), scaling, True)
    a, b = (each[adapter].weight.detach() for each in (layer.lora_A, layer.lora_B))
    experts = getattr(layer, "num_experts", 1)
    if experts > 1:  # A is expert-major, B expert-minor
        a, b = whole(a), whole(b)
        a = a.reshape(experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
        return Factors(a, b, scaling, not layer._did_swap_in_out_features)
    a, b = a.flatten(1), b.flatten(1)  # of convolutions
    if a.shape[0] != b.shape[1]:  # grouped convolutions: each group has factors of its own
        return None
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return Factors(a, b, scaling, False)
    return Factors(a, b, scaling, bool(getattr(layer, "fan_in_fan_out", False)))


def peft_class(layer: Any) -> type:
    """The class of PEFT that a layer has, also below classes that FSDP2 and others put on it."""
    return next(each for each in type(layer).__mro__ if each.__module__.startswith("peft."))


def _is_lora(layer: Any) -> bool:
    place = peft_class(layer).__module__
    return place.startswith("peft.tuners.lora.") and not is_routed(layer)


def is_routed(layer: Any) -> bool:
    """Whether the layer scales its adapters anew for each input (X-LoRA)."""
    router = getattr(layer.forward, "__self__", None)
    return type(router).__module__.startswith("peft.tuners.xlora")
