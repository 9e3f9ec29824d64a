"""What is inside of what the user gives."""

import torch
from torch import nn

from probes.optimizers.nesting import (
    given_optimizers,
    innermost_optimizer,
    innermost_optimizers,
    optimizer_layers,
    optimizers_of,
)


class Wrapper:
    def __init__(self, **held):
        vars(self).update(held)

    def step(self):
        raise NotImplementedError

    zero_grad = step


def test_optimizers_are_found_in_attributes_of_any_name():
    layer = nn.Linear(2, 2)
    one, other = torch.optim.SGD([layer.weight]), torch.optim.SGD([layer.bias])
    scheduler = torch.optim.lr_scheduler.ConstantLR(one)
    inner = Wrapper(anything=one, model=layer)
    outer = Wrapper(schedule=scheduler, of={"a": inner}, others=[other, None, 3])
    assert optimizer_layers(outer) == [outer, inner, other, one]
    assert innermost_optimizers(outer) == [other, one]
    assert innermost_optimizer(inner) is one
    outer.itself = inner.outer = outer  # a circle
    assert innermost_optimizers(outer) == [other, one]
    one.owner = outer
    assert innermost_optimizers(outer)[0] is other


def test_a_property_that_gives_the_optimizer_counts():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())

    class Hidden(Wrapper):
        __slots__ = ()

        @property
        def optimizer(self):
            return optimizer

    assert innermost_optimizer(Hidden()) is optimizer


def test_what_is_given_may_be_one_several_or_a_dict():
    layer = nn.Linear(2, 2)
    one, other = torch.optim.SGD([layer.weight]), torch.optim.SGD([layer.bias])
    assert given_optimizers(one) == (one,)
    for several in ([one, other], (one, other), {1: one, 2: other}, iter([one, other])):
        assert given_optimizers(several) == (one, other)
    assert optimizers_of(nn.Linear(2, 2), [one]) == []
    assert optimizers_of(layer, [Wrapper(a=one, b=other)]) == [one, other]
