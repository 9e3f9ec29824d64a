"""A small model whose modules have several layers, trained and recorded in a plain loop."""

from itertools import product

import torch
from torch import nn

import dynamics as dy
from dynamics.metrics.modules import by_module, tracker_key
from probes import Live, Recorder


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(12, 24)
        self.down_proj = nn.Linear(24, 12, bias=False)

    def forward(self, x):
        return x + self.down_proj(self.up_proj(x).relu())


class Net(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def build():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def loop(model, optimizer, steps, *, start=0, after_step=None):
    for step in range(start + 1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=generator)
        loss = (model(x) - x.flip(1)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step, loss.item())
    return model


def train(store, to, *, steps=6, every=2, live=(), after_step=None, **options):
    """The parameters after a training whose live values go to `to`."""
    model, optimizer = build()
    settings = Live(to=to, **{"budget": None, **dict(live)})
    with Recorder(model, optimizer, store, every=every, live=settings, **options):
        loop(model, optimizer, steps, after_step=after_step)
    return list(model.parameters())


def expected(store, metrics=("effective_rank",), kinds=("weight", "gradient", "update"), **options):
    """step -> key -> value, of `analyze` of a recording: means over the layers of each module."""
    analysis = by_module(dy.analyze(store, **options))
    found = {step: {} for step in analysis["step"].values.tolist()}
    for kind, metric, module in product(kinds, metrics, analysis["module"].values.tolist()):
        values = analysis[metric].sel(kind=kind, module=module).values.tolist()
        for step, value in zip(found, values, strict=True):
            if value == value:
                found[step][tracker_key(kind, metric, module)] = value
    return found
