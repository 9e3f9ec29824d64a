"""Learning rates of all groups, and of optimizers that make their own."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Adafactor
from transformers.optimization import AdafactorSchedule

import dynamics as dy
from probes import Recorder
from probes.optimizers.learning_rates import learning_rates


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def trained(store, made, optimizer, steps=3, scheduler=None):
    with Recorder(made, optimizer, store, every=1):
        for _ in range(steps):
            made(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return dy.open_run(store).scalars


def test_groups_that_differ_have_a_scalar_each_named_or_numbered(tmp_path):
    made = model()
    groups = [
        {"params": made[0].parameters(), "lr": 0.1, "name": "body"},
        {"params": made[1].parameters(), "lr": 0.2, "name": "head"},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    scalars = trained(tmp_path / "run.zarr", made, optimizer, scheduler=scheduler)
    np.testing.assert_allclose(scalars["learning_rate"], [0, 0, 0.05, 0.1])
    body, head = "learning_rate/body", "learning_rate/head"
    # Also where a warmup makes them the same.
    np.testing.assert_allclose(scalars[body], [0, 0, 0.05, 0.1])
    np.testing.assert_allclose(scalars[head], [0, 0, 0.1, 0.2])


def test_groups_of_several_optimizers_are_counted_on():
    made = model()
    one = torch.optim.SGD([{"params": [each]} for each in made[0].parameters()], lr=0.1)
    other = torch.optim.AdamW(made[1].parameters(), lr=torch.tensor(0.25))
    found = learning_rates([one, other])
    assert next(iter(found)) == "learning_rate"
    assert [float(each) for each in found.values()] == [0.1, 0.1, 0.1, 0.25]
    assert list(learning_rates([one])) == ["learning_rate"]


def test_a_group_without_a_rate_does_not_end_the_recording(tmp_path):
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": None})

        @torch.no_grad()
        def step(self, closure=None):
            for each in self.param_groups[0]["params"]:
                each.sub_(0.1 * each.grad)

    made = model()
    scalars = trained(tmp_path / "run.zarr", made, Own(made.parameters()))
    assert "learning_rate" not in scalars
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [False, True])
def test_the_rate_of_adafactor_of_transformers_is_that_of_its_step(tmp_path, scale):
    made = model()
    optimizer = Adafactor(made.parameters(), lr=None, scale_parameter=scale, warmup_init=True)
    asked, schedule = [], AdafactorSchedule(optimizer)
    with Recorder(made, optimizer, tmp_path / "run.zarr", every=1):
        for _ in range(3):
            made(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            asked.append(schedule.get_lr()[0])  # transformers' own answer
            optimizer.zero_grad()
    found = dy.open_run(tmp_path / "run.zarr").scalars["learning_rate"]
    assert math.isnan(found[0])
    np.testing.assert_allclose(found[1:], asked)


def test_the_rate_of_adafactor_of_torch_falls_with_the_step(tmp_path):
    made = model()
    optimizer = torch.optim.Adafactor(made.parameters(), lr=0.9)
    scalars = trained(tmp_path / "run.zarr", made, optimizer)
    np.testing.assert_allclose(scalars["learning_rate"][1:], [0.9, 2**-0.5, 3**-0.5])
