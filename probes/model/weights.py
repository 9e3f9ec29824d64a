"""The weights that a live model computes with: where each is read, and what is no weight."""

from collections.abc import Iterator

from torch import nn

from dynamics.runs import parameter_names
from probes.model.lora import is_tuner_layer, weights_of_tuner_layer
from probes.model.weight import Factors, NotRead, PlainSource, Weight

__all__ = ["Factors", "NotRead", "Weight", "find_weights"]


def find_weights(model: nn.Module) -> tuple[list[Weight], list[NotRead]]:
    """Every weight of the model, and every parameter that is no weight of its own.

    Each parameter belongs to exactly one of them. A parameter that several modules share counts
    once, under the first of its names, as in `named_parameters`.

    Args:
        model: any module, wrapped or not.

    Example:
        >>> weights, not_read = find_weights(nn.Linear(3, 2))
        >>> [(weight.name, weight.shape) for weight in weights], not_read
        ([('weight', (2, 3)), ('bias', (2,))], [])
    """
    weights, not_read = [], []
    for each in _Walk()(model, ""):
        if isinstance(each, Weight):
            weights.append(each)
        else:
            not_read.append(each)
    return weights, not_read


class _Walk:
    """Goes through modules in the order of `named_parameters`, each module and parameter once."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, module: nn.Module, path: str) -> Iterator[Weight | NotRead]:
        if self._is_new(module):
            if is_tuner_layer(module):
                yield from weights_of_tuner_layer(module, path, self)
            else:
                yield from self._plain(module, path)

    def _plain(self, module: nn.Module, path: str) -> Iterator[Weight | NotRead]:
        for name, parameter in module._parameters.items():
            if parameter is not None and self._is_new(parameter):
                yield Weight(
                    parameter_names.clean_name(_join(path, name)),
                    parameter,
                    tuple(parameter.shape),
                    parameter.dtype,
                    module,
                    PlainSource(parameter),
                )
        for name, child in module._modules.items():
            if child is not None:
                yield from self(child, _join(path, name))

    def _is_new(self, found: object) -> bool:
        new = id(found) not in self._seen
        self._seen.add(id(found))
        return new


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
