"""A metric of several runs."""

import numpy as np
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.plots import plot_comparison, plot_heatmap, plot_trajectory
from tests.dynamics.plots.drawn import (
    STEPS,
    UP_0,
    UP_1,
    dashed_levels,
    heatmap_cells,
    labelled_lines,
)


def test_a_comparison_draws_means_over_the_layers_and_their_range(comparison):
    ax = plot_comparison(comparison, "stable_rank")
    lines = labelled_lines(ax)
    assert list(lines) == ["a", "b"]
    values = comparison["stable_rank"].sel(kind="weight")
    values = values.sel(matrix=values["layer"] >= 0)
    assert values.sizes["matrix"] == 4
    for label, steps, band in zip("ab", (STEPS, [*STEPS, 30]), ax.collections, strict=True):
        of_run = values.sel(run=label, step=steps)
        np.testing.assert_array_equal(lines[label][0], steps)
        np.testing.assert_allclose(lines[label][1], of_run.mean("matrix"), rtol=1e-15)
        corners = band.get_paths()[0].vertices
        for step in steps:
            heights = corners[corners[:, 0] == step][:, 1]
            assert heights.min() == float(of_run.sel(step=step).min())
            assert heights.max() == float(of_run.sel(step=step).max())


def test_a_comparison_of_one_module_shows_only_it(comparison):
    ax = plot_comparison(comparison, "stable_rank", module="embed_tokens")
    expected = comparison["stable_rank"].sel(
        kind="weight", run="b", matrix="model.embed_tokens.weight"
    )
    np.testing.assert_allclose(labelled_lines(ax)["b"][1], expected, rtol=1e-15)
    assert ax.get_title() == "embed_tokens"


def test_a_run_without_the_kind_is_named_in_the_legend(comparison):
    ax = plot_comparison(comparison, "stable_rank", kind="gradient")
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["a", "b (no gradient)"]
    assert labelled_lines(ax)["b (no gradient)"].size == 0


def test_matrices_outside_the_layers_are_compared_where_there_are_no_others(write_recording):
    stores = [write_recording(MemoryStore(), seed=n, shapes={"lm_head": (4, 3)}) for n in (0, 1)]
    comparison = dy.compare({"a": dy.open_run(stores[0]), "b": dy.open_run(stores[1])})
    assert np.isfinite(labelled_lines(plot_comparison(comparison))["a"][1]).all()


def test_differences_are_drawn_with_their_sign_and_say_from_what(comparison):
    less = dy.difference(comparison, baseline="a")
    ax = plot_comparison(less, "condition_number")
    drawn = less["condition_number"].sel(run="b", kind="weight", step=STEPS)
    drawn = drawn.sel(matrix=drawn["layer"] >= 0)
    assert (drawn < 0).any()
    np.testing.assert_allclose(labelled_lines(ax)["b"][1], drawn.mean("matrix"), rtol=1e-12)
    assert ax.get_yscale() == "linear"
    assert ax.get_ylabel().endswith(", weight, less a")
    one = dy.select_run(less, "b")
    assert dashed_levels(plot_trajectory(one, "effective_rank")) == []
    assert plot_trajectory(one, "condition_number").get_yscale() == "linear"
    cells = heatmap_cells(plot_heatmap(one, "condition_number", module="up_proj"))
    expected = one["condition_number"].sel(kind="weight", matrix=[UP_0, UP_1])
    np.testing.assert_allclose(cells.filled(np.nan), expected.values.T, rtol=1e-12)
