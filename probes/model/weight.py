"""One weight that a model computes with, and what is no weight of its own."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter


class Factors(NamedTuple):
    """Factors of the active adapter: it is scaling · B @ A, transposed for (in, out) weights.

    A stack of weights (experts) has a stack of factors: the leading axes are those of the stack.
    Factors of a convolution belong to its flat view, out x in·kh·kw.
    """

    a: torch.Tensor  # (..., r, in)
    b: torch.Tensor  # (..., out, r)
    scaling: float
    transposed: bool


class Source(Protocol):
    """Where a weight is read from.

    One with an attribute `is_adapted` may have an adapter between the base and the weight; one with
    `base_trains` has a base that trains beside it.
    """

    def read(self) -> torch.Tensor:
        """The weight that the model computes with now, detached."""
        ...

    def base(self) -> torch.Tensor:
        """The weight without adapter, detached."""
        ...

    def factors(self) -> Factors | None:
        """The factors of the active adapter; None where there is none."""
        ...


@dataclass(frozen=True)
class PlainSource:
    """A parameter that the model computes with as it is."""

    parameter: torch.Tensor

    def read(self) -> torch.Tensor:
        """The parameter, detached."""
        return self.parameter.detach()

    def base(self) -> torch.Tensor:
        """The parameter, detached: no adapter adds to it."""
        return self.parameter.detach()

    def factors(self) -> Factors | None:
        """None: no adapter adds to it."""
        return None


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of a model, of any number of dimensions.

    Attributes:
        name: as the unwrapped model without adapters spells it, e.g. `lm_head.weight`.
        parameter: the parameter whose gradient is recorded as that of this weight, or None where
            there is none: quantised weights, weights made of several parameters, adapters that
            do not add to the weight, and those of `target_parameters`.
        shape: of the weight itself, not of packed bytes.
        dtype: of what `read` gives.
        module: the module that computes with it, e.g. the `nn.Linear` inside of a LoRA layer.
        source: where it is read from.
        parts: the parameters that it is made of, besides those of an adapter.
        stored_as: (name, shape) of the tensor that has its numbers, where there are fewer of them.
        readable: False for packed weights that nothing here can unpack, but whose adapter has
            factors. They cannot be read, and a `NotRead` of the same name stands for them.
    """

    name: str
    parameter: nn.Parameter | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: nn.Module
    source: Source = field(repr=False)
    parts: tuple[nn.Parameter, ...] = field(default=(), repr=False)
    stored_as: tuple[str, tuple[int, ...]] | None = None
    readable: bool = True

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def trains(self) -> bool:
        """Whether a parameter that it is made of requires a gradient now."""
        return any(each.requires_grad for each in self.parts)

    @property
    def base_trains(self) -> bool:
        """Whether its base trains by construction, beside the factors of its adapter (SLTrain)."""
        return getattr(self.source, "base_trains", False)

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The weight that the model computes with now, as merging the adapter would store it.

        Without an adapter this is the parameter itself, detached, which training will change.
        """
        return self.source.read()

    @torch.no_grad()
    def base(self) -> torch.Tensor:
        """The weight without its adapter. May be the parameter itself, detached."""
        return self.source.base()

    @torch.no_grad()
    def own_base(self) -> torch.Tensor | None:
        """The base weight where it does not follow from weight and factors; None elsewhere.

        This is so for adapters that are more than s·B·A (DoRA), for `modules_to_save`, and for a
        base that trains, whose zeros a difference would not give.
        """
        if not getattr(self.source, "is_adapted", False):
            return None
        if self.factors() is not None and not self.base_trains:
            return None
        return self.source.base()

    def factors(self) -> Factors | None:
        """The factors of the active adapter, not copied; None where there is none to add."""
        return self.source.factors()


@dataclass(frozen=True)
class NotRead:
    """A parameter, or a quantised weight, that is no weight of its own or cannot be read.

    Attributes:
        name: its clean name, with the parts that PEFT or torch gave it.
        shape: of the tensor; of the true weight where it is quantised and this is known.
        numbers: how many numbers it has; of packed bytes where the true weight is not known.
        trains: whether it requires a gradient.
        reason: a noun phrase that can be counted and grouped, e.g. "adapter factors".
        recorded_elsewhere: whether its numbers are in factors or in a weight that can be read.
        parameter: the parameter; None for quantised weights that are no parameters.
    """

    name: str
    shape: tuple[int, ...]
    numbers: int
    trains: bool
    reason: str
    recorded_elsewhere: bool = False
    parameter: nn.Parameter | None = field(default=None, repr=False, compare=False)


def plain_weight(name: str, parameter: nn.Parameter, module: nn.Module) -> Weight:
    """A weight that is a parameter, as it is."""
    return Weight(
        name,
        parameter,
        tuple(parameter.shape),
        parameter.dtype,
        module,
        PlainSource(parameter),
        (parameter,),
    )


def not_read(
    name: str, parameter: nn.Parameter, reason: str, recorded_elsewhere: bool = False
) -> NotRead:
    """A parameter that is no weight of its own."""
    is_known = not isinstance(parameter, UninitializedParameter)
    return NotRead(
        name,
        tuple(parameter.shape) if is_known else (),
        parameter.numel() if is_known else 0,
        parameter.requires_grad,
        reason,
        recorded_elsewhere,
        parameter,
    )
