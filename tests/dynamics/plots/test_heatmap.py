"""Layers by steps."""

import numpy as np

from dynamics.plots import plot_heatmap
from tests.dynamics.plots.drawn import (
    UP_0,
    UP_1,
    heatmap_cells,
)


def test_a_heatmap_is_layers_by_steps(analysis):
    ax = plot_heatmap(analysis, "stable_rank", module="up_proj")
    values = analysis["stable_rank"].sel(kind="weight", matrix=[UP_0, UP_1])
    np.testing.assert_allclose(heatmap_cells(ax), values.values.T, rtol=1e-15)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "10", "20"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1"]
    assert ax.get_title() == "up_proj"


def test_a_heatmap_without_a_module_is_the_mean_over_the_modules(analysis):
    ax = plot_heatmap(analysis, "stable_rank")
    values = analysis["stable_rank"].sel(kind="weight")
    of_layer = values.sel(matrix=values["layer"] == 1).mean("matrix")
    np.testing.assert_allclose(heatmap_cells(ax)[1], of_layer, rtol=1e-15)


def test_cells_without_a_value_are_masked(analysis):
    cells = heatmap_cells(plot_heatmap(analysis, "stable_rank", kind="gradient"))
    assert np.ma.getmaskarray(cells).tolist() == [[True, False, False]] * 2
