"""Layers of PEFT: which weights they hold, and what becomes of them.

Plain LoRA is read as W + s·B·A, see `lora`. Everything else (DoRA, LoHa, OFT, IA3, VeRA, trainable
tokens, ...) is merged by PEFT itself, on a copy of the layer. This costs a copy of the layer for
the time of one reading. What PEFT cannot merge is left out by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from probes.model import lora
from probes.model.quantised import PackedSource
from probes.model.twin import plain, twin, whole
from probes.model.weight import Factors, NotRead, Source, Weight, not_read

Found = Iterator[Weight | NotRead]
Walk = Callable[[nn.Module, str], Found]

TWICE = "factors that PEFT adds twice (out_proj of nn.MultiheadAttention)"


@dataclass(frozen=True)
class AdaptedSource:
    """A weight of a layer of PEFT, with whatever adapters are active when it is read.

    Plain LoRA is added; what else there is, PEFT merges on a copy of the layer, which is not
    sharded. Both have the bits of a merge.
    """

    layer: Any
    name: str  # of the weight inside of the base layer
    bases: Mapping[str, Source]  # name -> each weight that the base layer has itself
    is_adapted: ClassVar[bool] = True

    def read(self) -> torch.Tensor:
        """The base weight with the active adapters."""
        layer, base = self.layer, self.base()
        if layer.merged != layer.disable_adapters:  # they are added already, or not at all
            return base
        # torch has no convolutions of sharded tensors, and no views of sharded stacks
        is_addable = base.ndim == 2 or not isinstance(base, DTensor)
        if is_addable and self._is_adapted() and lora.is_plain_lora(layer):
            return lora.added(layer, base)
        return self._merged()

    def base(self) -> torch.Tensor:
        """The base weight."""
        return self.bases[self.name].read()

    def factors(self) -> Factors | None:
        """The factors of the active adapter, where it is s·B·A."""
        if self._is_adapted() and lora.has_factors(self.layer):
            return lora.active_factors(self.layer)
        return None

    def _is_adapted(self) -> bool:
        return self.name == lora.adapted_weight_name(self.layer)

    def _merged(self) -> torch.Tensor:
        if lora.is_routed(self.layer):
            raise TypeError("the weight under X-LoRA depends on the input")
        copied = twin(self.layer)
        base = copied.get_base_layer()
        for name, source in self.bases.items():
            plain(base, name, whole(source.read()).clone())
        _merge_unpacked(copied)
        if self.layer.merged:  # and disabled: the layer takes the adapters out when it computes
            copied.unmerge()
        else:
            copied.merge()
        weight: torch.Tensor = getattr(copied.get_base_layer(), self.name)
        return weight.detach()


@dataclass(frozen=True)
class AttentionSource:
    """A weight of `nn.MultiheadAttention` with LoRA.

    PEFT replaces its parameters in each forward pass: they are looked up each time. PEFT merges on
    a copy of the layer.
    """

    layer: Any
    name: str
    is_adapted: ClassVar[bool] = True

    def read(self) -> torch.Tensor:
        """The base weight with the active adapters."""
        if self.layer.merged != self.layer.disable_adapters:
            return self.base()
        copied = twin(self.layer)
        if self.layer.merged:
            copied.unmerge()
        else:
            copied.merge()
        weight: torch.Tensor = attrgetter(self.name)(copied.base_layer)
        return weight.detach()

    def base(self) -> torch.Tensor:
        """The base weight."""
        weight: torch.Tensor = attrgetter(self.name)(self.layer.base_layer)
        return weight.detach()

    def factors(self) -> Factors | None:
        """The factors of the active adapter, for the weight to which PEFT adds them once."""
        return lora.active_factors(self.layer) if self.name == "in_proj_weight" else None


@dataclass(frozen=True)
class SavedSource:
    """A weight of `modules_to_save`: of the copy that is active, else of the original."""

    wrapper: Any
    original: Source
    copies: Mapping[str, Source]
    is_adapted: ClassVar[bool] = True

    def read(self) -> torch.Tensor:
        """The weight of the active copy."""
        return self.copies.get(active_copy(self.wrapper) or "", self.original).read()

    def base(self) -> torch.Tensor:
        """The weight of the original."""
        return self.original.base()

    def factors(self) -> Factors | None:
        """None: the whole weight trains."""
        return None


def weights_of_tuner_layer(layer: Any, path: str, walk: Walk) -> Found:
    """The weights of a layer that PEFT wraps, and the parameters of its adapters.

    Args:
        layer: a `BaseTunerLayer`.
        path: the name of the layer, with a dot at the end unless it is the model itself.
        walk: finds the weights of any module.
    """
    if isinstance(layer.base_layer, nn.MultiheadAttention) and hasattr(layer, "lora_A"):
        yield from _multihead_attention(layer, path, walk)
        return
    base, adapted = layer.get_base_layer(), path + lora.adapted_weight_name(layer)
    found = list(walk(layer.base_layer, path))
    bases = {
        each.name.removeprefix(path): each.source
        for each in found
        if isinstance(each, Weight) and each.module is base
    }
    # A tied layer has no token rows of its own: it is the weight of the one it is tied to.
    merging = getattr(layer, "tied_adapter", None) or layer
    is_plain, is_found, is_merged = lora.is_plain_lora(layer), False, False
    for each in found:
        is_adapted = each.name == adapted
        has_bias = is_plain and each.name == f"{path}bias" and any(layer.lora_bias.values())
        if isinstance(each, NotRead) or each.module is not base:
            yield each
            continue
        if is_plain and not is_adapted and not has_bias:
            yield each
            continue
        source = AdaptedSource(merging, each.name.removeprefix(path), bases)
        # PEFT moves parameters of `target_parameters` around in each forward pass, where nothing
        # can stand in for them to take their gradient.
        parameter = each.parameter if is_plain and not hasattr(layer, "parameter_name") else None
        read = _if_read(layer, replace(each, source=source, parameter=parameter))
        is_found |= is_adapted
        is_merged |= isinstance(read, Weight)
        yield read
    factors = lora.active_factors(layer) if is_plain and not is_found else None
    if factors is not None and not factors.a.is_meta:
        yield _only_factors(layer, adapted, factors)
    yield from _adapter_parameters(layer, path, is_merged)


def weights_of_saved_module(wrapper: Any, path: str, walk: Walk) -> Found:
    """The weights of a module in `modules_to_save`, under the names that they have without PEFT.

    Args:
        wrapper: a `ModulesToSaveWrapper`.
        path: the name of the module, with a dot at the end unless it is the model itself.
        walk: finds the weights of any module.
    """
    original = list(walk(wrapper.original_module, path))
    copies = {name: list(walk(copy, path)) for name, copy in wrapper.modules_to_save.items()}
    active = active_copy(wrapper)
    bases = {each.name: each.source for each in original if isinstance(each, Weight)}
    sources: dict[str, dict[str, Source]] = {}
    for adapter, found in copies.items():
        for each in found:
            if isinstance(each, Weight):
                sources.setdefault(each.name, {})[adapter] = each.source
    for each in original if active is None else copies[active]:
        if isinstance(each, Weight) and each.name in bases:
            source = SavedSource(wrapper, bases[each.name], sources.get(each.name, {}))
            yield replace(each, source=source)
        else:
            yield each
    for adapter, found in copies.items():
        if adapter != active:
            yield from _unused(found, "copies of modules_to_save that are not active")
    if active is not None:
        yield from _unused(original, "originals of modules_to_save")


def active_copy(wrapper: Any) -> str | None:
    """The adapter whose copy a `ModulesToSaveWrapper` computes with; None for the original."""
    if wrapper.disable_adapters:
        return None
    return next((each for each in wrapper.active_adapters if each in wrapper.modules_to_save), None)


def _merge_unpacked(copied: Any) -> None:
    """Let a copy of a layer with a packed base merge into its unpacked base, and not pack it."""
    copied.quantization_backend = None
    package, _, module = lora.peft_class(copied).__module__.rpartition(".")
    if package == "peft.tuners.lora" and module not in ("layer", "variants"):
        from peft.tuners.lora.layer import Linear

        copied.__class__ = Linear
        copied.fan_in_fan_out = getattr(copied, "fan_in_fan_out", False)


def _if_read(layer: Any, weight: Weight) -> Weight | NotRead:
    """The weight with its dtype; left out by name if PEFT fails to merge it."""
    is_linear = lora.peft_class(layer).__name__ == "Linear" and lora.is_plain_lora(layer)
    if is_linear and weight.dtype.itemsize > 1:
        return weight  # the common case, which never fails, is not worth a merge of the model
    try:
        return replace(weight, dtype=weight.read().dtype)
    except Exception:  # of any method
        parameter = weight.parts[0] if weight.parts else None
        reason = f"weights under {_method(layer)} adapters that PEFT cannot merge"
        return NotRead(
            weight.name, weight.shape, weight.numbers, weight.trains, reason, parameter=parameter
        )


def _multihead_attention(layer: Any, path: str, walk: Walk) -> Found:
    base = layer.base_layer
    own = "in_proj_weight", "out_proj.weight"
    for name in own:
        # No parameter: PEFT replaces it in each forward pass, and no gradient reaches it.
        source = AttentionSource(layer, name)
        weight = source.read()
        module = base if name == own[0] else base.out_proj.get_base_layer()
        yield Weight(path + name, None, tuple(weight.shape), weight.dtype, module, source)
    for each in walk(base, path):
        if isinstance(each, NotRead) and each.name.startswith(f"{path}out_proj.lora_"):
            yield replace(each, reason=TWICE, recorded_elsewhere=False)
        elif each.name not in [path + name for name in own]:
            yield each
    yield from _adapter_parameters(layer, path)


def _only_factors(layer: Any, name: str, factors: Factors) -> Weight:
    rows, cols = factors.b.shape[-2], factors.a.shape[-1]
    shape = (*factors.a.shape[:-2], *((cols, rows) if factors.transposed else (rows, cols)))
    own = lora.adapted_weight_name(layer)
    source = AdaptedSource(layer, own, {own: PackedSource()})
    dtype = factors.a.dtype
    return Weight(name, None, shape, dtype, layer.get_base_layer(), source, readable=False)


def _adapter_parameters(layer: Any, path: str, is_merged: bool = False) -> Found:
    """The parameters of a layer's adapters, and what becomes of each."""
    only = f"{_method(layer)} adapters{', of which only the merged weight is read' * is_merged}"
    is_lora, active = lora.has_factors(layer), layer.active_adapters
    if hasattr(layer, "parameter_name"):  # several of such layers lie in each other
        path += f"{layer.parameter_name}."
    for name, parameter in _own_parameters(layer):
        adapter = next((part for part in name.split(".") if part in active), None)
        is_elsewhere = False
        if adapter is None and not lora.is_routed(layer):
            reason = "adapters that are not active"
        elif hasattr(layer, "trainable_tokens_delta"):
            reason, is_elsewhere = "trainable token rows", True
        elif not is_lora:
            reason = only
        elif parameter.ndim == 1:
            reason = "biases of adapters"
        elif len(lora.active_adapters(layer)) > 1:
            reason = "factors of several active adapters"
        elif adapter is None or lora.factors_of(layer, adapter) is None:
            reason = "factors of grouped convolutions"
        else:
            reason, is_elsewhere = "adapter factors", True
        yield not_read(path + name, parameter, reason, is_elsewhere)


def _own_parameters(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            yield name, parameter
    base = layer._modules["base_layer"]
    for child, module in layer._modules.items():
        if module is not None and module is not base:
            for name, parameter in module.named_parameters():
                yield f"{child}.{name}", parameter


def _unused(found: list[Weight | NotRead], reason: str) -> Found:
    for each in found:
        if isinstance(each, NotRead):
            yield each
        else:
            for parameter in each.parts:
                yield not_read(each.name, parameter, reason)


def _method(layer: Any) -> str:
    """What PEFT calls the method of a layer: "DoRA", "LOHA", ..."""
    for variant in getattr(layer, "lora_variant", {}).values():
        name = re.sub(r"(Linear|Embedding|Conv\dd)?Variant$", "", type(variant).__name__)
        return name.replace("Dora", "DoRA").replace("Lora", "LoRA").replace("lora", "LoRA")
    if lora.is_routed(layer):
        return "X-LoRA"
    method = lora.peft_class(layer).__module__.split(".")[2].upper()
    return {"LORA": "LoRA"}.get(method, method)
