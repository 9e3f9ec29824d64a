"""CoLA layers: two factors in the place of a weight, in the same model otherwise."""

import pytest
import torch

import dynamics as dy
from dynamics.errors import MissingError
from probes.relora import build_model, micro, parameter_counts
from probes.relora.layers.cola import CoLALinear
from probes.relora.layers.of_method import with_layers_of
from tests.probes.relora.conftest import tiny_config


def model(**changes):
    config = tiny_config(method="cola", **changes)
    return with_layers_of(config, build_model(config)), config


def test_only_the_targeted_layers_are_factors_and_all_else_is_that_of_the_twin():
    made, config = model(target_modules=("q_proj", "up_proj"))
    twin = dict(build_model(tiny_config(method="full_rank")).named_parameters())
    factors = [name for name, _ in made.named_parameters() if "cola" in name]
    assert len(factors) == 2 * 2 * config.num_layers
    for name, parameter in made.named_parameters():
        if name not in factors:
            assert torch.equal(parameter, twin[name]), name
    again, _ = model(target_modules=("q_proj", "up_proj"))
    assert all(map(torch.equal, made.parameters(), again.parameters()))


def test_parameters_are_counted_without_a_model():
    made, config = model()
    count = sum(parameter.numel() for parameter in made.parameters())
    assert parameter_counts(config) == (count, count)
    assert parameter_counts(micro("cola"))[0] < parameter_counts(micro("full_rank"))[0]


def test_outputs_and_jacobians_have_rank_r_and_no_weight_stands_for_them():
    layer = CoLALinear(24, 18, rank=4).double()
    x = torch.randn(50, 24, dtype=torch.float64)
    assert int(torch.linalg.matrix_rank(layer(x))) == 4
    one, other = (torch.autograd.functional.jacobian(layer, each) for each in x[:2])
    assert int(torch.linalg.matrix_rank(one)) == 4
    assert torch.linalg.norm(one - other) > 0.1 * torch.linalg.norm(one)


def test_its_factors_are_measured_and_circuits_are_refused(tmp_path):
    made, _ = model()
    made.save_pretrained(tmp_path / "checkpoint-0")
    run = dy.open_run(tmp_path / "checkpoint-0")
    found = dy.analyze(run, kinds=["weight"])
    modules = set(found["module"].values.tolist())
    assert {"mlp.up_proj.cola_a", "mlp.up_proj.cola_b", "embed_tokens"} <= modules
    assert "up_proj" not in modules
    assert float(found["rank_bound"].sel(matrix=found["module"] == "mlp.up_proj.cola_a").max()) == 4
    with pytest.raises(MissingError, match=r"No attention of .* has"):
        dy.analyze(run, kinds=["weight"], components=["ov_circuit"])
