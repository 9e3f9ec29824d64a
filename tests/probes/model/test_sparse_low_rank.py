"""Layers of SLTrain in models of any class: what is recorded of them, and what is left out."""

import numpy as np
import pytest
import torch
from torch import nn

import dynamics as dy
from probes import Recorder
from probes.model.weights import find_weights
from probes.relora.layers.sltrain import SLTrainLinear

RANK, SCALE = 2, 1.5


class LayerOfUsers(nn.Module):
    """With the parts of the published layer, and no weight that could be looked at."""

    def __init__(self, columns, rows, scaling=SCALE):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(RANK, columns))
        self.lora_B = nn.Parameter(torch.randn(rows, RANK))
        self.sparse_value = nn.Parameter(torch.randn(rows))
        self.register_buffer("sparse_index", torch.randperm(rows * columns)[:rows].sort().values)
        self.bias = nn.Parameter(torch.zeros(rows))
        if scaling is not None:
            self.scaling = scaling

    def forward(self, x):
        scaling = self.scaling.tanh() if isinstance(self.scaling, nn.Parameter) else self.scaling
        sparse = torch.zeros(self.lora_B.shape[0], self.lora_A.shape[1], dtype=x.dtype).flatten()
        sparse = sparse.scatter(0, self.sparse_index, self.sparse_value).view(-1, x.shape[-1])
        return x @ (sparse + self.lora_B @ (scaling * self.lora_A)).T + self.bias


def dense(layer):
    """S and s·B·A, in float64, entry by entry."""
    a, b, values = (
        each.detach().double().numpy() for each in (layer.lora_A, layer.lora_B, layer.sparse_value)
    )
    base = np.zeros((b.shape[0], a.shape[1]))
    for place, value in zip(layer.sparse_index.tolist(), values, strict=True):
        base[divmod(place, a.shape[1])] = value
    scaling = layer.scaling
    scaling = float(np.tanh(scaling.item())) if isinstance(scaling, nn.Parameter) else scaling
    return base, scaling * b @ a


@pytest.mark.parametrize("trained_scaling", [False, True])
def test_weight_base_adapter_and_gradient_are_those_of_the_layer(tmp_path, trained_scaling):
    torch.manual_seed(0)
    scaling = nn.Parameter(torch.tensor([0.7])) if trained_scaling else SCALE
    model = nn.Sequential(
        LayerOfUsers(9, 12, scaling), SLTrainLinear(12, 7, RANK, scaling=2.0, sparsity=0.2)
    )
    with torch.no_grad():
        model[1].lora_B.normal_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        xs = [torch.randn(3, 5, 9), torch.randn(2, 5, 9)]  # two micro-batches
        expected = []
        for x in xs:
            loss = model(x).square().sum()
            h = model[0](x).detach()
            gy = 2 * model[1](h)
            expected.append(gy.reshape(-1, 7).T @ h.reshape(-1, 12))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    run = dy.open_run(tmp_path / "run.zarr")
    assert set(run.matrices) == {"0.weight", "1.weight"}
    for name, layer in (("0.weight", model[0]), ("1.weight", model[1])):
        base, product = dense(layer)
        assert run.sparse_entries(name) == len(layer.sparse_index)
        assert run.trains(name) is True
        np.testing.assert_array_equal(run.read(name, 1, "base").values, base)
        adapter = run.read(name, 1, "adapter")
        assert adapter.rank_bound == RANK
        np.testing.assert_allclose(adapter.product(), product, rtol=1e-6)
        np.testing.assert_allclose(
            run.read(name, 1, "weight").values, base + product, rtol=1e-5, atol=1e-6
        )
    gradient = run.read("1.weight", 1, "gradient").values
    np.testing.assert_allclose(gradient, sum(expected).detach(), rtol=1e-4, atol=1e-4)
    stored = sum(each.numel() for each in model.parameters())
    account = run.account
    assert account.numbers + sum(each.numbers for each in account.left_out) == stored
    assert account.trained_share == pytest.approx(account.share)
    found = dy.analyze(run, kinds=["update", "displacement", "adapter"])
    bound = found["rank_bound"].isel(step=-1)
    assert bound.sel(kind="adapter").values.tolist() == [RANK, RANK]
    assert bound.sel(kind="displacement").values.tolist() == [9, 7]
    assert not dy.audit(run).failed


def test_a_recorded_training_computes_the_same_bits(tmp_path):
    def trained(record):
        torch.manual_seed(0)
        model = SLTrainLinear(12, 7, RANK, scaling=2.0, sparsity=0.2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        recorder = Recorder(model, optimizer, tmp_path / "run.zarr", every=1) if record else None
        for _ in range(3):
            model(torch.randn(4, 12)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if recorder:
            recorder.close()
        return model.state_dict()

    with_recorder, without = trained(True), trained(False)
    assert all(torch.equal(with_recorder[name], without[name]) for name in without)


@pytest.mark.slow  # the compiler takes seconds
def test_a_compiled_model_has_the_gradients_of_the_same_model(tmp_path):
    """Called before the recorder is there, and recorded at every second step."""
    found = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            SLTrainLinear(9, 12, RANK, scaling=2.0, sparsity=0.2),
            nn.Tanh(),
            SLTrainLinear(12, 7, RANK, scaling=2.0, sparsity=0.2),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.randn(4, 9)
        called(x).sum()
        with Recorder(called, optimizer, tmp_path / f"{compiled}.zarr", every=2):
            for _ in range(4):
                optimizer.zero_grad()
                called(x).square().sum().backward()
                optimizer.step()
        run = dy.open_run(tmp_path / f"{compiled}.zarr")
        found[compiled] = [
            run.read(name, step, "gradient").values for name in run.matrices for step in (2, 4)
        ]
    for one, other in zip(*found.values(), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


def test_layers_whose_scaling_is_not_known_are_left_out_by_name():
    weights, others = find_weights(LayerOfUsers(9, 12, scaling=None))
    assert [each.name for each in weights] == ["bias"]
    assert {each.name for each in others} == {"lora_A", "lora_B", "sparse_value"}
    assert all("scaling is not known" in each.reason for each in others)
