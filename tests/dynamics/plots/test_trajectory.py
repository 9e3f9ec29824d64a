"""Metrics over training, of one run."""

import json

import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import MissingError
from dynamics.plots import plot_heatmap, plot_trajectory
from tests.dynamics.plots.drawn import (
    STEPS,
    UP_0,
    UP_1,
    dashed_levels,
    labelled_lines,
)


def test_trajectories_by_module_are_means_over_the_layers(analysis):
    ax = plot_trajectory(analysis, "stable_rank", by="module")
    lines = labelled_lines(ax)
    assert set(lines) == {"embed_tokens", "q_proj", "up_proj"}
    values = analysis["stable_rank"].sel(kind="weight")
    expected = (values.sel(matrix=UP_0).values + values.sel(matrix=UP_1).values) / 2
    np.testing.assert_array_equal(lines["up_proj"][0], STEPS)
    np.testing.assert_allclose(lines["up_proj"][1], expected, rtol=1e-15)


def test_trajectories_by_layer_are_means_over_the_modules_of_a_layer(analysis):
    lines = labelled_lines(plot_trajectory(analysis, "effective_rank", by="layer"))
    assert list(lines) == ["layer 0", "layer 1"]
    values = analysis["effective_rank"].sel(kind="weight")
    expected = values[
        :, [str(name).startswith("model.layers.1") for name in values["matrix"].values]
    ]
    assert expected.shape == (3, 2)
    np.testing.assert_allclose(lines["layer 1"][1], expected.mean("matrix"), rtol=1e-15)


def test_trajectories_by_matrix_are_the_values(analysis):
    lines = labelled_lines(plot_trajectory(analysis, "frobenius_norm", kind="update", by="matrix"))
    assert list(lines) == analysis["matrix"].values.tolist()
    values = analysis["frobenius_norm"].sel(kind="update", matrix=UP_1)
    np.testing.assert_array_equal(lines[UP_1][1], values)
    assert np.isnan(lines[UP_1][1][0])


def test_the_rank_bound_is_drawn_where_all_matrices_share_it(analysis, adapter_analysis):
    assert dashed_levels(plot_trajectory(adapter_analysis, "effective_rank", kind="adapter")) == [2]
    assert dashed_levels(plot_trajectory(adapter_analysis, "numerical_rank", kind="adapter")) == [2]
    assert dashed_levels(plot_trajectory(adapter_analysis, "stable_rank", kind="adapter")) == []
    assert dashed_levels(plot_trajectory(analysis, "effective_rank")) == [8]


def test_the_axes_say_what_they_show(analysis):
    ax = plot_trajectory(analysis, "condition_number", kind="gradient")
    assert ax.get_xlabel() == "optimizer step"
    assert ax.get_ylabel() == f"{analysis['condition_number'].attrs['long_name']}, gradient"
    assert ax.get_yscale() == "log"
    assert plot_trajectory(analysis, "effective_rank").get_yscale() == "linear"


def test_many_lines_have_no_legend(write_recording):
    shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (2, 2) for layer in range(17)}
    analysis = dy.analyze(write_recording(MemoryStore(), steps=(0,), shapes=shapes))
    ax = plot_trajectory(analysis, by="layer")
    assert ax.get_legend() is None
    assert len(labelled_lines(ax)) == 17


def test_an_analysis_without_layers_has_no_lines_by_layer(write_recording):
    run = write_recording(MemoryStore(), shapes={"model.embed_tokens.weight": (4, 3)})
    analysis = dy.analyze(run)
    assert list(labelled_lines(plot_trajectory(analysis))) == ["embed_tokens"]
    for draw in (lambda: plot_trajectory(analysis, by="layer"), lambda: plot_heatmap(analysis)):
        with pytest.raises(MissingError, match="No weight inside the stack of layers"):
            draw()


def test_one_run_of_a_comparison_is_drawn_after_selecting_it(comparison):
    chosen = comparison.sel(run="b")
    ax = plot_trajectory(chosen.assign_attrs(events=json.dumps([])), by="matrix")
    np.testing.assert_array_equal(
        labelled_lines(ax)[UP_1][1],
        comparison["effective_rank"].sel(run="b", kind="weight", matrix=UP_1),
    )
