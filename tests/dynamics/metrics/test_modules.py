"""Means over the layers of a module."""

import math

import numpy as np
import pytest

import dynamics as dy
from dynamics.metrics.modules import by_module, labels_of, mean, metric_names, tracker_key
from dynamics.runs.run import matrices_of


@pytest.fixture
def analysis(write_recording, tmp_path):
    return dy.analyze(write_recording(tmp_path / "run.zarr"), metrics=["stable_rank", "rank_bound"])


def test_a_module_is_the_mean_of_its_matrices_at_every_step_and_kind(analysis):
    means = by_module(analysis)
    assert list(means.data_vars) == ["stable_rank", "rank_bound"]
    assert means.module.values.tolist() == ["embed_tokens", "up_proj", "q_proj"]
    for module in means.module.values.tolist():
        of_module = analysis["stable_rank"][..., (analysis["module"] == module).values]
        for kind in analysis.kind.values.tolist():
            for step in analysis.step.values.tolist():
                values = [x for x in of_module.sel(kind=kind, step=step).values if x == x]
                found = means["stable_rank"].sel(kind=kind, step=step, module=module).item()
                if values:
                    assert found == math.fsum(values) / len(values)
                else:
                    assert math.isnan(found)
    assert means["stable_rank"].attrs == analysis["stable_rank"].attrs


def test_means_do_not_depend_on_the_order_or_the_layout(analysis):
    turned = analysis.isel(matrix=slice(None, None, -1)).transpose("matrix", "step", "kind", ...)
    left, right = by_module(analysis), by_module(turned)
    right = right.transpose(*left["stable_rank"].dims).sel(module=left.module)
    assert left["stable_rank"].values.tobytes() == right["stable_rank"].values.tobytes()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, math.nan, 2.0], 1.5),
        ([], math.nan),
        ([math.nan], math.nan),
        ([math.inf, 1.0], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([1e308, 1e308], 1e308),
        ([np.float32(0.1)], float(np.float32(0.1))),
    ],
)
def test_means_of_special_values(values, expected):
    assert mean(values) == pytest.approx(expected, rel=0, nan_ok=True)


def test_stacks_and_attentions_are_never_pooled():
    names = [
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.1.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "shared.weight",
    ]
    infos = matrices_of(dict.fromkeys(names, (4, 4)))
    labels = dict(zip(infos, labels_of(infos.values()), strict=True))
    assert labels[names[0]] == labels[names[1]] == "encoder.self.q_proj"
    assert labels[names[2]] == "decoder.self.q_proj"
    assert labels[names[3]] == "decoder.cross.q_proj"
    assert tracker_key("weight", "stable_rank", labels[names[4]]).count("/") == 3


def test_comparisons_keep_their_runs_and_differences_have_no_status(write_recording, tmp_path):
    a = dy.analyze(write_recording(tmp_path / "a.zarr"), metrics=["stable_rank"])
    b = dy.analyze(write_recording(tmp_path / "b.zarr", seed=1), metrics=["stable_rank"])
    both = dy.compare({"a": a, "b": b}).assign_coords(seed=("run", [0, 1]))
    means = by_module(both)
    assert means["stable_rank"].sel(run="b").equals(by_module(b)["stable_rank"].assign_coords(
        run="b", seed=1))  # fmt: skip
    assert means.seed.values.tolist() == [0, 1]
    assert metric_names(dy.difference(both, baseline="a")) == ["stable_rank"]
    assert by_module(dy.difference(both, baseline="a")).run.values.tolist() == ["b"]
    with pytest.raises(dy.DynamicsError, match="dimension 'statistic'"):
        by_module(dy.over(both, "seed"))
    with pytest.raises(dy.DynamicsError, match="no metrics"):
        by_module(both[["status"]])
