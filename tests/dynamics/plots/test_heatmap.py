"""Layers by steps."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.plots import plot_heatmap
from tests.dynamics.plots.drawn import UP_0, UP_1, heatmap_cells


def edges_of(ax):
    return ax.collections[0].get_coordinates()[0, :, 0].tolist()


def test_a_heatmap_is_layers_by_steps(analysis):
    ax = plot_heatmap(analysis, "stable_rank", module="up_proj")
    values = analysis["stable_rank"].sel(kind="weight", matrix=[UP_0, UP_1])
    np.testing.assert_allclose(heatmap_cells(ax), values.values.T, rtol=1e-15)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1"]
    assert ax.get_title() == "up_proj"


def test_a_heatmap_without_a_module_is_the_mean_over_the_modules(analysis):
    ax = plot_heatmap(analysis, "stable_rank")
    values = analysis["stable_rank"].sel(kind="weight")
    of_layer = values.sel(matrix=values["layer"] == 1).mean("matrix")
    np.testing.assert_allclose(heatmap_cells(ax)[1], of_layer, rtol=1e-15)


def test_cells_without_a_value_are_masked(analysis):
    holes = analysis.copy(deep=True)
    holes["stable_rank"].loc[{"kind": "weight", "step": 10, "matrix": UP_0}] = np.nan
    ax = plot_heatmap(holes, "stable_rank", module="up_proj")
    cells = heatmap_cells(ax)
    assert ax.patch.get_hatch()
    assert "Hatched: not measured." in dy.caption(ax)
    whole = plot_heatmap(analysis, "stable_rank", module="up_proj")
    assert not whole.patch.get_hatch()
    assert "Hatched" not in dy.caption(whole)
    assert np.ma.getmaskarray(cells).tolist() == [[False, True, False], [False] * 3]


def test_a_cell_reaches_from_the_record_before_it_to_its_own(write_recording):
    from zarr.storage import MemoryStore

    run = dy.open_run(write_recording(MemoryStore(), steps=(0, 10, 40, 41)))
    analysis = dy.analyze(run)
    assert edges_of(plot_heatmap(analysis)) == [-10, 0, 10, 40, 41]  # 10 is the first interval
    # There is no gradient at step 0: its cells begin there.
    assert edges_of(plot_heatmap(analysis, kind="gradient")) == [0, 10, 40, 41]
    assert edges_of(plot_heatmap(analysis, x="tokens")) == [-640, 0, 640, 2560, 2624]


def test_merges_lie_between_the_cells_of_their_cycles(analysis):
    ax = plot_heatmap(analysis, kind="gradient")
    assert {line.get_xdata()[0] for line in ax.get_lines()} == {10}  # 20 is the edge of the map
    assert "Dotted white: the merge." in dy.caption(ax)


def test_colours_are_logarithmic_where_a_decade_is_not_enough(analysis):
    wide = analysis.copy(deep=True)
    wide["stable_rank"].loc[{"matrix": UP_0}] *= 100
    mesh = plot_heatmap(wide, "stable_rank", module="up_proj").collections[0]
    assert isinstance(mesh.norm, LogNorm)
    assert not isinstance(plot_heatmap(analysis, "stable_rank").collections[0].norm, LogNorm)
    linear = plot_heatmap(wide, "stable_rank", module="up_proj", log=False).collections[0]
    assert not isinstance(linear.norm, LogNorm)
    assert isinstance(plot_heatmap(analysis, "condition_number").collections[0].norm, LogNorm)


def test_the_limits_of_the_colours_can_be_given_and_must_be_in_order(analysis):
    mesh = plot_heatmap(analysis, limits=(1, 9)).collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1, 9)
    for limits in ((9, 1), (0, np.inf)):
        with pytest.raises(DynamicsError, match="limits are"):
            plot_heatmap(analysis, limits=limits)
    with pytest.raises(DynamicsError, match="cannot begin at 0"):
        plot_heatmap(analysis, log=True, limits=(0, 9))


def test_differences_have_zero_in_the_middle_of_the_colours(comparison):
    less = dy.select_run(dy.difference(comparison, baseline="a"), "b")
    ax = plot_heatmap(less)
    norm = ax.collections[0].norm
    assert norm.vmin == -norm.vmax < 0
    assert "Zero is in the middle" in dy.caption(ax)


def test_condition_numbers_have_geometric_means(analysis):
    cells = heatmap_cells(plot_heatmap(analysis, "condition_number"))
    values = analysis["condition_number"].sel(kind="weight")
    expected = np.exp(np.log(values.sel(matrix=values["layer"] == 0)).mean("matrix"))
    np.testing.assert_allclose(cells[0], expected, rtol=1e-12)


def test_the_bar_names_the_metric_and_the_kind(analysis):
    plot_heatmap(analysis, "stable_rank", kind="update")
    assert plt.gcf().axes[-1].get_ylabel() == "stable rank, update"
