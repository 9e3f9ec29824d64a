"""What holds for every figure: axes, data, marks of merges, errors."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.plots import plot_comparison, plot_heatmap, plot_spectrum, plot_trajectory
from tests.dynamics.plots.drawn import (
    UP_0,
    labelled_lines,
    vertical_lines,
)

FIGURES = {
    "trajectory": lambda comparison, single, ax: plot_trajectory(single, ax=ax),
    "heatmap": lambda comparison, single, ax: plot_heatmap(single, ax=ax),
    "spectrum": lambda comparison, single, ax: plot_spectrum(single, UP_0, ax=ax),
    "spectra": lambda comparison, single, ax: dy.plot_spectra_over_time(single, UP_0, ax=ax),
    "comparison": lambda comparison, single, ax: plot_comparison(comparison, ax=ax),
    "difference": lambda comparison, single, ax: dy.plot_difference(
        comparison, baseline="a", ax=ax
    ),
    "staircase": lambda comparison, single, ax: dy.plot_staircase(single, kind="update", ax=ax),
    "budget": lambda comparison, single, ax: dy.plot_rank_budget(comparison, kind="weight", ax=ax),
    "loss": lambda comparison, single, ax: dy.plot_loss(comparison, metric=None, ax=ax),
    "loss above ranks": lambda comparison, single, ax: dy.plot_loss(single, ax=ax),
}


def drawing(function, *arguments, **options):
    return lambda data: function(data, *arguments, **options)


@pytest.mark.parametrize("style", FIGURES)
def test_figures_are_drawn_on_the_given_axes(comparison, analysis, style):
    figure, (left, right) = plt.subplots(1, 2)
    ax = FIGURES[style](comparison, analysis, right)
    assert ax is right
    assert right.has_data()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("style", FIGURES)
def test_figures_make_axes_of_their_own_where_none_are_given(comparison, analysis, style):
    first, second = (
        FIGURES[style](comparison, analysis, None),
        FIGURES[style](comparison, analysis, None),
    )
    assert first.figure is not second.figure


@pytest.mark.parametrize("style", FIGURES)
def test_drawing_changes_no_data(comparison, analysis, style):
    before = comparison.copy(deep=True), analysis.copy(deep=True)
    FIGURES[style](comparison, analysis, None)
    assert comparison.identical(before[0])
    assert analysis.identical(before[1])


def test_merges_are_marked_at_their_steps(analysis, comparison):
    assert vertical_lines(plot_trajectory(analysis)) == [10, 20]
    assert vertical_lines(plot_comparison(comparison)) == [10, 20, 30]


@pytest.mark.slow
@pytest.mark.parametrize("metric", dy.METRICS)
def test_every_metric_and_kind_can_be_drawn_in_every_style(
    comparison, analysis, adapter_analysis, metric
):
    figure = plt.figure()
    for kind in analysis["kind"].values.tolist():
        figure.clear()
        axes = figure.subplots(2, 2)
        plot_trajectory(analysis, metric, kind=kind, ax=axes[0, 0])
        plot_heatmap(analysis, metric, kind=kind, ax=axes[0, 1])
        plot_comparison(comparison, metric, kind=kind, ax=axes[1, 0])
        if kind == "update":
            if metric != "condition_number_raw":
                plot_heatmap(adapter_analysis, metric, kind="adapter", ax=axes[1, 1])
            figure.canvas.draw()


@pytest.mark.slow
def test_a_loaded_result_is_drawn_like_the_one_in_memory(comparison, analysis, tmp_path):
    loaded = dy.load(dy.save(comparison, tmp_path / "comparison.zarr"))
    for label, line in labelled_lines(plot_comparison(comparison)).items():
        np.testing.assert_array_equal(labelled_lines(plot_comparison(loaded))[label], line)
    loaded = dy.load(dy.save(analysis, tmp_path / "a.zarr"))
    for label, line in labelled_lines(plot_spectrum(analysis, UP_0)).items():
        np.testing.assert_array_equal(labelled_lines(plot_spectrum(loaded, UP_0))[label], line)


def test_infinite_numbers_cannot_be_drawn(adapter_analysis):
    assert np.isinf(adapter_analysis["condition_number_raw"]).all()
    for draw in (plot_trajectory, plot_heatmap):
        with pytest.raises(MissingError, match="condition_number_raw of adapter is infinite"):
            draw(adapter_analysis, "condition_number_raw", kind="adapter")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (drawing(plot_trajectory, "er"), "No metric 'er' in this analysis; it has effective_rank"),
        (drawing(plot_trajectory, "status"), "No metric 'status'"),
        (drawing(plot_trajectory, "loss"), "No metric 'loss'"),
        (drawing(plot_trajectory, kind="adapter"), "No kind 'adapter'.*it has weight, gradient"),
        (drawing(plot_trajectory, by="head"), "No grouping 'head'; known: layer, module, matrix"),
        (drawing(plot_heatmap, "er"), "No metric 'er'"),
        (drawing(plot_heatmap, kind="base"), "No kind 'base'"),
        (drawing(plot_heatmap, module="lm_head"), "'lm_head' was measured; there are q_proj"),
        (drawing(plot_spectrum, "w"), r"No measured weight of 'w'; there are model\.embed"),
        (drawing(plot_spectrum, UP_0, kind="base"), "No kind 'base'"),
        (drawing(plot_spectrum, UP_0, steps=[11]), "at step 11"),
        (drawing(plot_spectrum, UP_0, kind="gradient", steps=[0]), "No gradient of .* at step 0"),
    ],
)
def test_what_an_analysis_does_not_have_cannot_be_drawn(analysis, draw, message):
    with pytest.raises(MissingError, match=message):
        draw(analysis)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (drawing(plot_comparison, "er"), "No metric 'er'"),
        (drawing(plot_comparison, kind="adapter"), "No kind 'adapter'"),
        (drawing(plot_comparison, module="lm_head"), "'lm_head'"),
    ],
)
def test_what_a_comparison_does_not_have_cannot_be_drawn(comparison, draw, message):
    with pytest.raises(MissingError, match=message):
        draw(comparison)
    assert plt.get_fignums() == []


def test_a_kind_of_which_nothing_was_measured_cannot_be_drawn(write_recording):
    run = dy.open_run(write_recording(MemoryStore(), steps=(0,)))
    analysis = dy.analyze(run)
    assert "update" in analysis["kind"].values
    for draw in (plot_trajectory, plot_heatmap):
        with pytest.raises(MissingError, match="No update was measured"):
            draw(analysis, kind="update")


def test_each_figure_says_whether_it_takes_one_run_or_several(comparison, analysis):
    for draw in (plot_trajectory, plot_heatmap, drawing(plot_spectrum, UP_0)):
        with pytest.raises(DynamicsError, match=r"choose one of a, b with \.sel\(run="):
            draw(comparison)
    with pytest.raises(DynamicsError, match="takes what compare"):
        plot_comparison(analysis)


def test_many_merges_are_ticks_that_cover_nothing(write_recording):
    steps = range(0, 60, 2)
    run = dy.open_run(write_recording(MemoryStore(), steps=steps, merges=tuple(steps)[1:]))
    analysis = dy.analyze(run, kinds=["weight"])
    for ax in (plot_trajectory(analysis), plot_heatmap(analysis)):
        assert vertical_lines(ax) == []
        [ticks] = [each for each in ax.collections if each.get_label() == "_merges"]
        at = [segment[0][0] for segment in ticks.get_segments()]
        assert at == [step for step in steps[1:] if step < 58 or ax.get_ylabel() != "layer"]
        assert min(segment[0][1] for segment in ticks.get_segments()) == 1  # above the axes
        assert f"Ticks above: the {len(at)} merges." in dy.caption(ax)


def test_a_difference_has_no_ranks_or_spectra_of_its_own(comparison):
    less = dy.difference(comparison, baseline="a")
    for draw in (
        lambda: dy.plot_staircase(less, kind="weight"),
        lambda: dy.plot_rank_budget(less, kind="weight"),
        lambda: plot_spectrum(dy.select_run(less, "b"), UP_0),
        lambda: dy.plot_spectra_over_time(dy.select_run(less, "b"), UP_0),
    ):
        with pytest.raises(DynamicsError, match="less 'a', and this figure shows what runs have"):
            draw()


def test_a_matrix_of_zeros_has_no_spectrum(analysis):
    zero = analysis.copy(deep=True)
    zero["singular_value"].loc[{"kind": "update", "matrix": UP_0}] = 0.0
    for draw in (plot_spectrum, dy.plot_spectra_over_time):
        with pytest.raises(MissingError, match=f"All singular values of the update of {UP_0} are"):
            draw(zero, UP_0, kind="update")


def test_infinite_means_are_not_drawn_and_told(analysis):
    some = analysis.copy(deep=True)
    some["condition_number"].loc[{"kind": "weight", "step": 10, "matrix": UP_0}] = np.inf
    ax = plot_trajectory(some, "condition_number")
    line = labelled_lines(ax)["up_proj"]
    assert np.isfinite(line[1]).tolist() == [True, False, True]
    assert "Not drawn: means of infinite values (1 of 15)." in dy.caption(ax)
