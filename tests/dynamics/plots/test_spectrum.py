"""Singular values of one matrix at several steps."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.metrics import outliers
from dynamics.plots import plot_spectrum
from dynamics.spectra.random_matrices import marchenko_pastur_edges, random_spectrum
from tests.dynamics.plots.drawn import STEPS, UP_0, labelled_lines


def lines_called(ax, start):
    return [line for line in ax.get_lines() if str(line.get_label()).startswith(start)]


def test_a_spectrum_is_one_line_per_step(analysis):
    ax = plot_spectrum(analysis, UP_0)
    lines = labelled_lines(ax)
    assert list(lines) == ["step 0", "step 10", "step 20"]
    s = analysis["singular_value"].sel(kind="weight", matrix=UP_0)
    for step in STEPS:
        np.testing.assert_array_equal(lines[f"step {step}"][0], np.arange(1, 9))
        np.testing.assert_array_equal(lines[f"step {step}"][1], s.sel(step=step))
    assert ax.get_yscale() == "log"


def test_each_step_has_its_floor_in_its_colour_and_its_rank(cycles):
    ax = plot_spectrum(cycles, UP_0, kind="displacement", steps=[1, 3, 6])
    floors = cycles["noise_floor"].sel(kind="displacement", matrix=UP_0)
    ranks = cycles["numerical_rank"].sel(kind="displacement", matrix=UP_0)
    assert ranks.sel(step=[1, 3, 6]).values.tolist() == [2, 4, 6]  # by construction
    s = cycles["singular_value"].sel(kind="displacement", matrix=UP_0)
    dots = lines_called(ax, "_rank")
    for step, dot in zip((1, 3, 6), dots, strict=True):
        [line] = lines_called(ax, f"step {step}")
        [floor] = lines_called(ax, f"noise floor of step {step}")
        [below] = lines_called(ax, f"_below {step}")
        rank = int(ranks.sel(step=step))
        assert floor.get_ydata()[0] == float(floors.sel(step=step)) > 0
        assert {to_rgba(each.get_color()) for each in (floor, line, below)} == {
            to_rgba(dot.get_color())
        }
        np.testing.assert_array_equal(line.get_ydata(), s.sel(step=step)[:rank])
        np.testing.assert_array_equal(below.get_xdata(), np.arange(rank + 1, 13))
        assert below.get_linewidth() < line.get_linewidth()
        assert (dot.get_xdata(), dot.get_ydata()) == ([rank], [float(s.sel(step=step)[rank - 1])])
    bar = ax.figure.axes[-1]
    assert [each.get_text() for each in bar.get_yticklabels()] == ["1 (2)", "3 (4)", "6 (6)"]


def test_floors_below_all_values_are_told_and_leave_the_axes_to_the_values(analysis):
    ax = plot_spectrum(analysis, UP_0)
    floors = analysis["noise_floor"].sel(kind="weight", matrix=UP_0)
    smallest = float(analysis["singular_value"].sel(kind="weight", matrix=UP_0).min())
    assert float(floors.max()) < smallest / 10
    assert ax.get_ylim()[0] > smallest / 10
    assert f"{float(floors.min()):.1e}" in dy.caption(ax)


def test_a_spectrum_shows_the_steps_asked_for(analysis):
    ax = plot_spectrum(analysis, UP_0, kind="update", steps=[10])
    assert [name for name in labelled_lines(ax) if name.startswith("step")] == ["step 10"]
    with pytest.raises(DynamicsError, match="No step is asked for"):
        plot_spectrum(analysis, UP_0, steps=[])


def test_a_spectrum_shows_six_steps_at_most_and_the_ends_among_them(write_recording):
    run = write_recording(MemoryStore(), steps=range(20), shapes={"a": (3, 3)})
    lines = [
        name for name in labelled_lines(plot_spectrum(dy.analyze(run), "a")) if "noise" not in name
    ]
    assert len(lines) == 6
    assert (lines[0], lines[-1]) == ("step 0", "step 19")


def test_exact_zeros_of_a_spectrum_are_left_out(adapter_analysis):
    ax = plot_spectrum(adapter_analysis, UP_0, kind="adapter")
    assert labelled_lines(ax)["step 5"].shape == (2, 2)
    [below] = lines_called(ax, "_below 5")
    assert np.isnan(below.get_ydata()).all()


def spiked(write_recording, shape, spikes):
    def spoil(step, name, weight):
        weight += sum(20 * (n + 1) * np.outer(np.eye(shape[0])[n], np.eye(shape[1])[n])
                      for n in range(spikes))  # fmt: skip

    store = write_recording(MemoryStore(), steps=(0, 1), shapes={"a": shape}, spoil=spoil)
    return dy.analyze(store, kinds=["weight"])


@pytest.mark.parametrize("spikes", [0, 1, 3])
def test_the_bulk_and_its_outliers_are_those_of_the_metric(write_recording, spikes):
    analysis = spiked(write_recording, (60, 40), spikes)
    ax = plot_spectrum(analysis, "a")
    s = analysis["singular_value"].sel(kind="weight", matrix="a", step=1).values
    [circles] = lines_called(ax, "_outliers")
    assert len(circles.get_xdata()) == spikes == outliers(s, 60, 40, floor=0.0)
    np.testing.assert_array_equal(circles.get_ydata(), s[:spikes])
    [expected] = lines_called(ax, "_random")
    ratio = expected.get_ydata() / random_spectrum(60, 40)
    sigma = ratio[0]
    np.testing.assert_allclose(ratio, sigma, rtol=1e-12)
    assert abs(np.median(expected.get_ydata()) / np.median(s) - 1) < 0.02
    [bulk] = [each for each in ax.patches if each.get_label() == "_bulk"]
    box = bulk.get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose((box.y0, box.y1), np.multiply(sigma, marchenko_pastur_edges(60, 40)),
                               rtol=1e-6)  # fmt: skip
    word = {0: "No value lies beyond it", 1: "Circles: 1 outlier", 3: "Circles: 3 outliers"}
    assert word[spikes] in dy.caption(ax)


def test_matrices_of_low_rank_have_no_bulk(adapter_analysis, cycles):
    for analysis, kind, step in ((adapter_analysis, "adapter", 5), (cycles, "displacement", 3)):
        ax = plot_spectrum(analysis, UP_0, kind=kind, steps=[step])
        assert not lines_called(ax, "_random")
        with pytest.raises(DynamicsError, match=f"at step {step}: it has no bulk"):
            plot_spectrum(analysis, UP_0, kind=kind, steps=[step], bulk=True)


def test_the_bulk_can_be_left_out(analysis):
    assert lines_called(plot_spectrum(analysis, UP_0), "_random")
    assert not lines_called(plot_spectrum(analysis, UP_0, bulk=False), "_random")


def test_the_rank_bound_stands_behind_the_last_value_that_it_allows(adapter_analysis, cycles):
    ax = plot_spectrum(adapter_analysis, UP_0, kind="adapter")
    [bound] = {float(b) for b in adapter_analysis["rank_bound"].sel(kind="adapter", matrix=UP_0)}
    [line] = lines_called(ax, "_bound")
    assert line.get_xdata()[0] == bound + 0.5 < 8
    assert f"Dash-dotted: the rank bound of {bound:g}" in dy.caption(ax)
    assert not lines_called(plot_spectrum(cycles, UP_0, kind="displacement"), "_bound")
    raised = cycles.copy(deep=True)
    raised["rank_bound"].loc[{"kind": "displacement"}] = np.arange(0, 14, 2)[:, None]
    ax = plot_spectrum(raised, UP_0, kind="displacement", steps=[1, 3])
    assert [line.get_xdata()[0] for line in lines_called(ax, "_bound")] == [2.5, 6.5]
    assert "the rank bounds of the steps, 2 to 6" in dy.caption(ax)
