"""Spectra over training: index × time."""

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from tests.dynamics.plots.drawn import UP_0


def drawn(cycles, **options):
    ax = dy.plot_spectra_over_time(cycles, UP_0, kind="displacement", **options)
    mesh = ax.collections[0]
    shape = np.subtract(mesh.get_coordinates().shape[:2], 1)
    return ax, mesh, np.ma.asarray(mesh.get_array()).reshape(shape)


def test_cells_are_singular_values_between_records(cycles):
    ax, mesh, cells = drawn(cycles)
    s = cycles["singular_value"].sel(kind="displacement", matrix=UP_0, step=range(1, 7))
    np.testing.assert_array_equal(cells.filled(0), s.values.T)
    assert mesh.get_coordinates()[0, :, 0].tolist() == list(range(7))
    assert mesh.get_coordinates()[:, 0, 1].tolist() == [n + 0.5 for n in range(13)]
    assert ax.get_ylim() == (0.5, 12.5)


def test_the_stairs_are_the_numerical_rank(cycles):
    ax, _, _ = drawn(cycles)
    [stairs] = [line for line in ax.get_lines() if line.get_label() == "numerical rank"]
    ranks = cycles["numerical_rank"].sel(kind="displacement", matrix=UP_0, step=range(1, 7))
    assert ranks.values.tolist() == [2, 2, 4, 4, 6, 6]  # by construction
    assert stairs.get_drawstyle() == "steps-pre"
    assert stairs.get_xdata().tolist() == list(range(7))
    assert (stairs.get_ydata() - 0.5).tolist() == [2, 2, 2, 4, 4, 6, 6]


def test_the_colours_end_a_decade_below_what_counts(cycles):
    _, mesh, cells = drawn(cycles)
    floors = cycles["noise_floor"].sel(kind="displacement", matrix=UP_0, step=range(1, 7))
    counted = cells[cells > floors.values]
    assert mesh.norm.vmax == cells.max()
    assert mesh.norm.vmin == pytest.approx(counted.min() / 10)
    assert drawn(cycles, limits=(1e-9, 10))[1].norm.vmin == 1e-9
    with pytest.raises(DynamicsError, match="limits are"):
        drawn(cycles, limits=(1, 0.1))


def test_the_merges_lie_where_the_stairs_rise(cycles):
    ax, _, _ = drawn(cycles)
    assert {x[0] for line in ax.get_lines() if len(set(x := line.get_xdata())) == 1} == {2, 4}


def test_a_matrix_without_spectra_is_named(cycles, relora):
    with pytest.raises(MissingError, match="No measured displacement of 'w'"):
        dy.plot_spectra_over_time(cycles, "w", kind="displacement")
    with pytest.raises(MissingError, match="no singular values of the weight"):
        dy.plot_spectra_over_time(relora, relora["matrix"].values[3])
    with pytest.raises(MissingError, match="no singular values; measure the run again"):
        dy.plot_spectra_over_time(cycles.drop_vars("singular_value"), UP_0)


def test_a_matrix_that_did_not_move_has_nothing_to_draw(cycles):
    still = cycles.copy(deep=True)
    still["singular_value"].loc[{"kind": "displacement", "matrix": UP_0}] = 0.0
    with pytest.raises(MissingError, match=r"All singular values .* are zero"):
        drawn(still)


def test_exact_zeros_are_hatched_and_called_so(adapter_analysis):
    ax = dy.plot_spectra_over_time(adapter_analysis, UP_0, kind="adapter")
    assert "Hatched: zero." in dy.caption(ax)
    [stairs] = [line for line in ax.get_lines() if line.get_label() == "numerical rank"]
    assert set(stairs.get_ydata()) == {2.5}
