"""The weights that a live model computes with: where each is read, and what is no weight."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from dynamics.runs import parameter_names
from probes.model.adapters import weights_of_saved_module, weights_of_tuner_layer
from probes.model.parametrised import computed_weights, is_computed
from probes.model.quantised import (
    is_packed_module,
    weight_of_parameter,
    weights_of_packed_module,
)
from probes.model.sparse_low_rank import is_sparse_low_rank, weights_of_sparse_low_rank
from probes.model.weight import Factors, NotRead, Weight, not_read, plain_weight

__all__ = ["Factors", "NotRead", "Weight", "find_weights", "weight_wrappers"]


def find_weights(model: nn.Module) -> tuple[list[Weight], list[NotRead]]:
    """Every weight of the model, and every parameter that is no weight of its own.

    Each parameter belongs to exactly one of them: it is one of the `parts` of a weight, or it is
    not read. A parameter that several modules share counts once, under the first of its names, as
    in `named_parameters`. Where only one of these modules has an adapter, they compute with
    different weights, and both are there: `parameter` of the second is None.

    Nothing of the model is changed. Weights of adapters that are not plain LoRA, and packed and
    computed ones, are read once, to see whether and how they can be: each rank must call this.

    Args:
        model: any module, wrapped or not.

    Example:
        >>> weights, not_read = find_weights(nn.Linear(3, 2))
        >>> [(weight.name, weight.shape) for weight in weights], not_read
        ([('weight', (2, 3)), ('bias', (2,))], [])
    """
    weights: list[Weight] = []
    others: list[NotRead] = []
    seen: dict[int, set[Any]] = {}  # parameter -> which computations of it are there
    for each in _Walk()(model, ""):
        each = replace(each, name=parameter_names.clean_name(each.name))
        if isinstance(each, NotRead):
            if each.parameter is None or id(each.parameter) not in seen:
                seen.setdefault(id(each.parameter), set()).add(NotRead)
                others.append(each)
            continue
        computation = type(each.source), id(getattr(each.source, "layer", None))
        before = [seen.setdefault(id(part), set()) for part in each.parts]
        if any(computation in found or NotRead in found for found in before):
            continue
        weights.append(replace(each, parameter=None) if any(before) else each)
        for found in before:
            found.add(computation)
    return weights, others


def weight_wrappers(model: nn.Module) -> frozenset[int]:
    """The identities of all modules that make weights of others: of PEFT, and parametrised ones.

    They tell whether adapters came or went since `find_weights`.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> before = weight_wrappers(layer)
        >>> _ = nn.utils.parametrizations.spectral_norm(layer)
        >>> weight_wrappers(layer) == before
        False
    """
    found: set[int] = set()
    rest, seen = [model], {id(model)}
    while rest:
        module = rest.pop()
        if _peft_wrapper(module) is not None or is_computed(module):
            found.add(id(module))
        for child in module._modules.values():  # `modules()` changes attention layers with LoRA
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                rest.append(child)
    return frozenset(found)


class _Walk:
    """Goes through modules in the order of `named_parameters`, through each module once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, module: nn.Module, path: str) -> Iterator[Weight | NotRead]:
        """What is found in a module whose name is `path`, which ends with a dot or is empty."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        wrapper = _peft_wrapper(module)
        if wrapper is not None:
            yield from wrapper(module, path, self)
        elif is_packed_module(module):
            yield from weights_of_packed_module(module, path)
        elif is_sparse_low_rank(module):
            yield from weights_of_sparse_low_rank(module, path)
            yield from self._children(module, path)
        else:
            yield from self._plain(module, path)

    def around(self, wrapper: nn.Module, name: str, path: str) -> Iterator[Weight | NotRead]:
        """What is found in the module that a wrapper holds, and then in the wrapper itself."""
        if (inner := wrapper._modules.get(name)) is not None:
            yield from self(inner, path)
        yield from self._plain(wrapper, path)

    def _plain(self, module: nn.Module, path: str) -> Iterator[Weight | NotRead]:
        unknown = _has_unknown_adapter(module)
        for each in self._own(module, path):
            is_factor = "lora" in each.name.removeprefix(path).lower()
            if unknown and isinstance(each, Weight) and len(each.shape) > 1 and not is_factor:
                reason = f"weights under adapters that are not PEFT's ({type(module).__name__})"
                for part in each.parts:
                    yield not_read(each.name, part, reason)
            else:
                yield each

    def _own(self, module: nn.Module, path: str) -> Iterator[Weight | NotRead]:
        computed = list(computed_weights(module, path))
        yield from computed
        parts = {id(part) for each in computed for part in each.parts}
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in parts:
                continue
            found = weight_of_parameter(module, name, parameter, path)
            yield found or plain_weight(path + name, parameter, module)
        yield from self._children(module, path, *["parametrizations"] * bool(computed))

    def _children(self, module: nn.Module, path: str, *without: str) -> Iterator[Weight | NotRead]:
        for name, child in module._modules.items():
            if child is not None and name not in without:
                yield from self(child, f"{path}{name}.")


def _has_unknown_adapter(module: nn.Module) -> bool:
    """Whether a layer computes with more than its weight: LoRA of another library, or by hand."""
    names = [each.lower() for each in (*module._parameters, *module._modules)]
    return any(
        all(any(name.startswith(factor) for name in names) for factor in pair)
        for pair in (("lora_a", "lora_b"), ("lora_down", "lora_up"))
    )


def _peft_wrapper(module: nn.Module) -> Any:
    """What finds the weights of a wrapper of PEFT; None for any other module."""
    if "peft" not in sys.modules:  # then the model cannot contain a layer of PEFT
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, BaseTunerLayer):
        return weights_of_tuner_layer
    if isinstance(module, ModulesToSaveWrapper):
        return weights_of_saved_module
    if isinstance(module, TrainableTokensWrapper):
        return lambda wrapper, path, walk: walk(wrapper.token_adapter, path)
    if isinstance(module, PeftModel | PeftMixedModel):  # its base_model is no tuner for prompts
        return lambda wrapper, path, walk: walk.around(wrapper, "base_model", path)
    if isinstance(module, BaseTuner | _BaseAdaptedAttention):
        inner = "lora_model" if "lora_model" in module._modules else "model"  # X-LoRA
        return lambda wrapper, path, walk: walk.around(wrapper, inner, path)
    return None
