"""What of a model is recorded: the matrices of its weights, and an account of everything else."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dynamics.errors import DynamicsError
from dynamics.runs import parameter_names
from dynamics.runs.account import Account, LeftOut
from dynamics.runs.stacks import Part, parts_of
from probes.model.provenance import model_config
from probes.model.saved_names import saved_names
from probes.model.weights import Factors, NotRead, Weight, find_weights

Selection = str | Sequence[str] | Callable[[str, nn.Parameter | None], bool] | None

NOT_SELECTED = "not selected"


@dataclass(frozen=True)
class Tracked:
    """A weight of the model, and the matrices that it is recorded as.

    Attributes:
        name: its name in the files of the model, without the prefixes of wrappers.
        weight: where it is read.
        parts: the selected matrices of it: itself, or its experts.
    """

    name: str
    weight: Weight
    parts: tuple[Part, ...]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that its gradient belongs to; only where `has_gradient`."""
        assert self.weight.parameter is not None
        return self.weight.parameter

    @property
    def has_gradient(self) -> bool:
        """Whether one parameter has the gradient of this weight; quantised weights have none."""
        return self.weight.parameter is not None

    def matrices(self, tensor: torch.Tensor) -> Iterator[tuple[Part, torch.Tensor]]:
        """(part, matrix) of a tensor in the shape of the weight: views, (m, n)."""
        return ((part, part.of(tensor)) for part in self.parts)

    def factors_of(self, part: Part, factors: Factors) -> Factors:
        """The factors of one matrix, cut out of those of the weight."""
        if factors.a.ndim == 2:
            return factors
        expert, rows, cols = (*part.index, slice(None), slice(None))[:3]
        out, within = (cols, rows) if factors.transposed else (rows, cols)
        return factors._replace(a=factors.a[expert][:, within], b=factors.b[expert][out])


def track(model: nn.Module, select: Selection = None) -> tuple[tuple[Tracked, ...], Account]:
    """What of a model is recorded, and the account of all its parameters.

    Args:
        model: any module. Prefixes of wrappers are removed from the names.
        select: globs over names of matrices or parameters ("*_proj" matches with or without
            ".weight"), or a predicate of (name of the matrix, parameter); all by default. Where
            the files of the model have other names than the live model, both match.

    Raises:
        DynamicsError: nothing is selected.
    """
    weights, not_read = find_weights(model)
    names = saved_names(model, {each.name: each.shape for each in weights})
    config = model_config(model)
    tracked, left_out, known = [], [], []
    for each in weights:
        name = names.get(each.name, each.name)
        is_convolution = True if isinstance(each.module, _ConvNd) else None
        parts = parts_of(each.name, each.shape, config, convolution=is_convolution)
        trains = each.trains
        stored_name, stored_shape = each.stored_as or (name, each.shape)
        if isinstance(parts, str):
            left_out.append(LeftOut(name, each.shape, parts, trains))
            continue
        if len(parts) == 1 and parts[0].name == each.name:
            parts = (replace(parts[0], name=name),)
        known += [part.name for part in parts]
        chosen = tuple(part for part in parts if _selected(part, name, each, select))
        if chosen:
            tracked.append(Tracked(name, each, chosen))
        if not each.readable:  # only its factors are recorded; the packed weight is not read
            continue
        if not chosen:
            left_out.append(LeftOut(stored_name, stored_shape, NOT_SELECTED, trains, chosen=True))
        elif len(chosen) < len(parts):
            left_out += [
                LeftOut(part.name, (part.rows, part.cols), NOT_SELECTED, trains, chosen=True)
                for part in parts
                if part not in chosen
            ]
    if not tracked:
        raise DynamicsError(_nothing(select, known))
    return tuple(tracked), _account(tracked, left_out, not_read)


def _selected(part: Part, name: str, weight: Weight, select: Selection) -> bool:
    if select is None:
        return True
    if callable(select):
        return bool(select(part.name, weight.parameter))
    return any(parameter_names.matches(each, select) for each in {part.name, name, weight.name})


def _account(
    tracked: Sequence[Tracked], left_out: list[LeftOut], not_read: Sequence[NotRead]
) -> Account:
    measured: dict[str, tuple[int, ...]] = {}
    trained = 0
    for each in tracked:
        if not each.weight.readable:
            continue
        whole = sum(part.rows * part.cols for part in each.parts) == prod(each.weight.shape)
        shapes = (
            {each.name: each.weight.shape}
            if whole and each.weight.stored_as is None
            else dict([each.weight.stored_as])
            if each.weight.stored_as is not None
            else {part.name: (part.rows, part.cols) for part in each.parts}
        )
        measured |= shapes
        if each.weight.trains:
            trained += sum(map(prod, shapes.values()))
    for other in not_read:
        if other.recorded_elsewhere and _belongs_to(other, tracked):
            measured[other.name] = other.shape
            trained += other.numbers if other.trains else 0
        else:
            chosen = other.recorded_elsewhere
            reason = f"{other.reason}, {NOT_SELECTED}" if chosen else other.reason
            left_out.append(LeftOut(other.name, other.shape, reason, other.trains, chosen))
    return Account(measured, trained, tuple(left_out))


def _belongs_to(factor: NotRead, tracked: Sequence[Tracked]) -> bool:
    """Whether a factor is that of a recorded weight: it lies inside of the weight's layer."""
    layers = (each.weight.name.rpartition(".")[0] for each in tracked)
    return any(not layer or factor.name.startswith(f"{layer}.") for layer in layers)


def _nothing(select: Selection, known: Sequence[str]) -> str:
    text = f"No matrix of the model matches select={select!r}"
    if not known:
        return f"{text}: the model has none."
    if select is None or callable(select):
        patterns: list[str] = []
    else:
        patterns = [select] if isinstance(select, str) else list(select)
    near = [
        name
        for pattern in patterns
        for name in difflib.get_close_matches(pattern.strip("*"), known, n=3, cutoff=0.4)
    ]
    shown = list(dict.fromkeys(near)) or list(known[:4])
    what = "near matches" if near else f"the model has {len(known)}"
    return f"{text}; {what}: {', '.join(shown)}{'' if near else ', ...'}"
