"""The layer that ReLoRA and relora-pico put in place of a Linear, and what it computes with."""

import torch
from torch import nn


class LowRankLinear(nn.Module):
    """F.linear(x, weight) + s·B(A(x)), with parameters under the names that are asked for.

    Args:
        linear: the layer that it takes the place of.
        r: the rank.
        alpha: s is alpha / r, unless it is trained; then it is the tanh of a parameter.
        names: how the module calls A, B and the trained scaling.
        trained: whether s is trained.
        with_weight: whether there is a base weight.
    """

    def __init__(self, linear, *, r, alpha, names, trained=False, with_weight=True):
        super().__init__()
        a, b, s = names
        rows, cols = linear.weight.shape
        self.weight = linear.weight if with_weight else None
        setattr(self, a, nn.Linear(cols, r, bias=False))
        setattr(self, b, nn.Linear(r, rows, bias=False))
        if trained:
            setattr(self, s, nn.Parameter(torch.tensor([1.0])))
        self.names, self.fixed = names, None if trained else alpha / r

    @property
    def scale(self):
        """s, a number or a tensor."""
        return getattr(self, self.names[2]).tanh() if self.fixed is None else self.fixed

    @property
    def factors(self):
        """The two Linears A and B."""
        return getattr(self, self.names[0]), getattr(self, self.names[1])

    def forward(self, x):
        a, b = self.factors
        low_rank = b(a(x)) * self.scale
        return low_rank if self.weight is None else nn.functional.linear(x, self.weight) + low_rank

    def merge(self):
        """Add s·B·A to the weight and begin anew."""
        a, b = self.factors
        with torch.no_grad():
            self.weight += self.scale * (b.weight @ a.weight)
            nn.init.kaiming_uniform_(a.weight)
            nn.init.zeros_(b.weight)

    def effective(self):
        """(out, in) float64: what the layer makes of the unit vectors."""
        cols = self.factors[0].weight.shape[1]
        layer = self.double()
        found = layer(torch.eye(cols, dtype=torch.float64)).T.detach().numpy().copy()
        self.float()
        return found


def replace_linears(model, targets, make):
    """Put `make(linear)` in place of every Linear whose name has one of the targets in it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(target in name for target in targets):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, make(module))
    return model


def randomize(model, seed):
    """Random factors and scalings: B = 0 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in low_rank_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name != "weight":
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def low_rank_layers(model):
    """Name of the weight -> layer."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
    }


def effective_weights(model):
    """Name -> what the model computes with, float64, for every matrix."""
    layers = low_rank_layers(model)
    found = {
        name: each.detach().double().numpy().copy()
        for name, each in model.named_parameters()
        if each.ndim == 2 and not any(name.startswith(f"{key[:-7]}.") for key in layers)
    }
    return found | {name: layer.effective() for name, layer in layers.items()}
