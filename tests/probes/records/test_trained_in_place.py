"""Weights trained in place are rounded at every step, and no rounding counts as a direction."""

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from probes import Recorder

RANK, EVERY, STEPS = 4, 20, 80
KINDS = ["weight", "update", "displacement"]


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64, bias=False), nn.Tanh(), nn.Linear(64, 32, bias=False))
    net[2].requires_grad_(False)
    return net


def train(net, each_step):
    """Gradient descent within RANK directions of the inputs, as GaLore's between two projectors."""
    directions = torch.linalg.qr(torch.randn(40, RANK))[0]
    optimizer = torch.optim.SGD(net[:1].parameters(), lr=0.05)
    with each_step(net, optimizer) as done:
        for step in range(1, STEPS + 1):
            x = torch.randn(16, 40)
            loss = (net(x) - x[:, :32]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            net[0].weight.grad = net[0].weight.grad @ directions @ directions.T
            optimizer.step()
            done(step)


class Saving:
    """Checkpoints as everybody writes them, instead of a recording."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def __call__(self, net, optimizer):
        self.net = net
        return self

    def __enter__(self):
        self.save(0)
        return lambda step: step % EVERY or self.save(step)

    def __exit__(self, *_):
        pass

    def save(self, step):
        torch.save(self.net.state_dict(), self.folder / f"step_{step}.pt")


class Recording:
    def __init__(self, store, **options):
        self.store, self.options = store, options

    def __call__(self, net, optimizer):
        self.recorder = Recorder(net, optimizer, self.store, every=EVERY, **self.options)
        return self

    def __enter__(self):
        self.recorder.attach()
        return lambda step: None

    def __exit__(self, *_):
        self.recorder.close()


@pytest.fixture(scope="module", params=["recording", "spectra", "checkpoints"])
def analysis(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    ways = {
        "recording": Recording(folder / "run.zarr"),
        "spectra": Recording(folder / "run.zarr", spectra_only=True, record=KINDS),
        "checkpoints": Saving(folder / "run"),
    }
    way = ways[request.param]
    train(model(), way)
    return dy.analyze(getattr(way, "store", None) or way.folder, kinds=KINDS)


def test_updates_and_displacements_have_the_rank_that_training_gave_them(analysis):
    trained = analysis.sel(matrix="0.weight")
    ranks = trained["numerical_rank"]
    assert ranks.sel(kind="update").values[1:].tolist() == [RANK] * 4
    assert ranks.sel(kind="displacement").values[1:].tolist() == [RANK] * 4
    smallest = trained["singular_value"].sel(kind="displacement", step=STEPS)[RANK]
    assert smallest > trained["storage_noise_floor"].sel(kind="displacement", step=STEPS)


def test_floors_say_which_roundings_they_count(analysis):
    trained = analysis.sel(matrix="0.weight")
    ratio = trained["noise_floor"] / trained["storage_noise_floor"]
    steps = np.array([20, 40, 60, 80])
    np.testing.assert_allclose(ratio.sel(kind="update")[1:], np.sqrt(21 / 2), rtol=0.02)
    np.testing.assert_allclose(
        ratio.sel(kind="displacement")[1:], np.sqrt((steps + 1) / 2), rtol=0.02
    )
    assert (ratio.sel(kind="weight") == 1).all()


@pytest.mark.parametrize("options", [{}, {"spectra_only": True, "record": KINDS}])
def test_an_adapter_bounds_nothing_where_its_base_trains_too(tmp_path, options):
    import peft

    net = model().requires_grad_(True)
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    net.base_model.model[0].base_layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], lr=0.05)
    with Recorder(net, optimizer, tmp_path / "run.zarr", every=2, **options):
        for _ in range(4):
            x = torch.randn(64, 40)
            (net(x) - x[:, :32]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found = dy.analyze(tmp_path / "run.zarr", kinds=["displacement"]).isel(kind=0, step=-1)
    trained, frozen = found.sel(matrix="0.weight"), found.sel(matrix="2.weight")
    assert trained["rank_bound"] == 40
    assert trained["noise_floor"] > trained["storage_noise_floor"]
    assert frozen["rank_bound"] == 2  # B was zero at the start
    assert frozen["noise_floor"] == frozen["storage_noise_floor"]
    assert not found["exceeds_rank_bound"].any()


def test_a_frozen_weight_is_rounded_by_nothing(analysis):
    frozen = analysis.sel(matrix="2.weight", kind=["update", "displacement"]).isel(step=slice(1, 5))
    if analysis.attrs["format"] == "recording":  # checkpoints do not tell what was frozen
        np.testing.assert_array_equal(frozen["noise_floor"], frozen["storage_noise_floor"])
    assert (frozen["numerical_rank"] == 0).all()
