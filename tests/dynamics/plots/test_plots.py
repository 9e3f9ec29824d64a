import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.plots import plot_comparison, plot_heatmap, plot_spectrum, plot_trajectory
from dynamics.recordings import RecordingWriter

UP0, UP1 = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
STEPS = [0, 10, 20]


@pytest.fixture(autouse=True)
def _figures_are_closed():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def analysis(write_recording):
    return dy.analyze(write_recording(MemoryStore(), merges=(10, 20)))


@pytest.fixture(scope="module")
def both(analysis, write_recording):
    run = dy.open_run(write_recording(MemoryStore(), seed=1, steps=(0, 10, 20, 30), merges=(30,)))
    return dy.compare({"a": analysis, "b": dy.analyze(run, kinds=["weight"])})


@pytest.fixture(scope="module")
def low_rank():
    """Adapters of rank 2, recorded without their weights."""
    store, rng = MemoryStore(), np.random.default_rng(0)
    writer = RecordingWriter(store, {})
    paths = [f"adapter/model.layers.{layer}.mlp.up_proj.weight/" for layer in (0, 1)]
    for step in (0, 5):
        factors = {}
        for path in paths:
            factors |= {f"{path}A": rng.standard_normal((2, 8))}
            factors |= {f"{path}B": rng.standard_normal((16, 2))}
        attrs = {"source_dtype": "float64", "scaling": 2.0, "transposed": False}
        writer.append(step, factors, attrs=dict.fromkeys(factors, attrs))
    return dy.analyze(dy.open_run(store))


def labelled(ax):
    """Label -> the line's data, for the lines that the legend would show."""
    return {
        line.get_label(): np.array([line.get_xdata(), line.get_ydata()], dtype=float)
        for line in ax.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def vertical_lines(ax):
    return sorted(
        float(line.get_xdata()[0])
        for line in ax.get_lines()
        if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
    )


def dashed_levels(ax):
    return [float(line.get_ydata()[0]) for line in ax.get_lines() if line.get_linestyle() == "--"]


DRAWN = {
    "trajectory": lambda both, single, ax: plot_trajectory(single, ax=ax),
    "heatmap": lambda both, single, ax: plot_heatmap(single, ax=ax),
    "spectrum": lambda both, single, ax: plot_spectrum(single, UP0, ax=ax),
    "comparison": lambda both, single, ax: plot_comparison(both, ax=ax),
}


@pytest.mark.parametrize("style", DRAWN)
def test_figures_are_drawn_on_the_given_axes(both, analysis, style):
    figure, (left, right) = plt.subplots(1, 2)
    found = DRAWN[style](both, analysis, right)
    assert found is right
    assert right.has_data()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("style", DRAWN)
def test_figures_make_axes_of_their_own_where_none_are_given(both, analysis, style):
    first, second = DRAWN[style](both, analysis, None), DRAWN[style](both, analysis, None)
    assert first.figure is not second.figure


@pytest.mark.parametrize("style", DRAWN)
def test_drawing_changes_no_data(both, analysis, style):
    before = both.copy(deep=True), analysis.copy(deep=True)
    DRAWN[style](both, analysis, None)
    assert both.identical(before[0])
    assert analysis.identical(before[1])


# Trajectories -----------------------------------------------------------------------------------


def test_trajectories_by_module_are_means_over_the_layers(analysis):
    ax = plot_trajectory(analysis, "stable_rank", by="module")
    lines = labelled(ax)
    assert set(lines) == {"embed_tokens", "q_proj", "up_proj"}
    values = analysis["stable_rank"].sel(kind="weight")
    expected = (values.sel(matrix=UP0).values + values.sel(matrix=UP1).values) / 2
    np.testing.assert_array_equal(lines["up_proj"][0], STEPS)
    np.testing.assert_allclose(lines["up_proj"][1], expected, rtol=1e-15)


def test_trajectories_by_layer_are_means_over_the_modules_of_a_layer(analysis):
    lines = labelled(plot_trajectory(analysis, "effective_rank", by="layer"))
    assert list(lines) == ["layer 0", "layer 1"]
    values = analysis["effective_rank"].sel(kind="weight")
    expected = values[
        :, [str(name).startswith("model.layers.1") for name in values["matrix"].values]
    ]
    assert expected.shape == (3, 2)
    np.testing.assert_allclose(lines["layer 1"][1], expected.mean("matrix"), rtol=1e-15)


def test_trajectories_by_matrix_are_the_values(analysis):
    lines = labelled(plot_trajectory(analysis, "frobenius_norm", kind="update", by="matrix"))
    assert list(lines) == analysis["matrix"].values.tolist()
    values = analysis["frobenius_norm"].sel(kind="update", matrix=UP1)
    np.testing.assert_array_equal(lines[UP1][1], values)
    assert np.isnan(lines[UP1][1][0])


def test_merges_are_marked_at_their_steps(analysis, both):
    assert vertical_lines(plot_trajectory(analysis)) == [10, 20]
    assert vertical_lines(plot_comparison(both)) == [10, 20, 30]


def test_the_rank_bound_is_drawn_where_all_matrices_share_it(analysis, low_rank):
    assert dashed_levels(plot_trajectory(low_rank, "effective_rank", kind="adapter")) == [2]
    assert dashed_levels(plot_trajectory(low_rank, "numerical_rank", kind="adapter")) == [2]
    assert dashed_levels(plot_trajectory(low_rank, "stable_rank", kind="adapter")) == []
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
    assert len(labelled(ax)) == 17


def test_an_analysis_without_layers_has_no_lines_by_layer(write_recording):
    run = write_recording(MemoryStore(), shapes={"model.embed_tokens.weight": (4, 3)})
    analysis = dy.analyze(run)
    assert list(labelled(plot_trajectory(analysis))) == ["embed_tokens"]
    for draw in (lambda: plot_trajectory(analysis, by="layer"), lambda: plot_heatmap(analysis)):
        with pytest.raises(MissingError, match="No weight inside the stack of layers"):
            draw()


# Spectra ----------------------------------------------------------------------------------------


def test_a_spectrum_is_one_line_per_step_with_the_last_noise_floor(analysis):
    ax = plot_spectrum(analysis, UP0)
    lines = labelled(ax)
    assert list(lines) == ["step 0", "step 10", "step 20", "noise floor"]
    s = analysis["singular_value"].sel(kind="weight", matrix=UP0)
    for step in STEPS:
        np.testing.assert_array_equal(lines[f"step {step}"][0], np.arange(1, 9))
        np.testing.assert_array_equal(lines[f"step {step}"][1], s.sel(step=step))
    floor = float(analysis["noise_floor"].sel(kind="weight", matrix=UP0, step=20))
    assert floor > 0
    assert dashed_levels(ax) == [floor]
    assert ax.get_yscale() == "log"


def test_a_spectrum_shows_the_steps_asked_for(analysis):
    ax = plot_spectrum(analysis, UP0, kind="update", steps=[10])
    assert list(labelled(ax)) == ["step 10", "noise floor"]
    floor = float(analysis["noise_floor"].sel(kind="update", matrix=UP0, step=10))
    assert dashed_levels(ax) == [floor]


def test_a_spectrum_shows_six_steps_at_most_and_the_ends_among_them(write_recording):
    run = write_recording(MemoryStore(), steps=range(20), shapes={"a": (3, 3)})
    lines = list(labelled(plot_spectrum(dy.analyze(run), "a")))[:-1]
    assert len(lines) == 6
    assert (lines[0], lines[-1]) == ("step 0", "step 19")


def test_exact_zeros_of_a_spectrum_are_left_out(low_rank):
    lines = labelled(plot_spectrum(low_rank, UP0, kind="adapter"))
    assert np.isfinite(lines["step 5"][1]).tolist() == [True] * 2 + [False] * 6


# Heatmaps ---------------------------------------------------------------------------------------


def grid(ax):
    mesh = ax.collections[0]
    return np.ma.asarray(mesh.get_array()).reshape(len(ax.get_yticks()), -1)


def test_a_heatmap_is_layers_by_steps(analysis):
    ax = plot_heatmap(analysis, "stable_rank", module="up_proj")
    values = analysis["stable_rank"].sel(kind="weight", matrix=[UP0, UP1])
    np.testing.assert_allclose(grid(ax), values.values.T, rtol=1e-15)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "10", "20"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1"]
    assert ax.get_title() == "up_proj"


def test_a_heatmap_without_a_module_is_the_mean_over_the_modules(analysis):
    ax = plot_heatmap(analysis, "stable_rank")
    values = analysis["stable_rank"].sel(kind="weight")
    of_layer = values.sel(matrix=values["layer"] == 1).mean("matrix")
    np.testing.assert_allclose(grid(ax)[1], of_layer, rtol=1e-15)


def test_cells_without_a_value_are_masked(analysis):
    cells = grid(plot_heatmap(analysis, "stable_rank", kind="gradient"))
    assert np.ma.getmaskarray(cells).tolist() == [[True, False, False]] * 2


def test_infinite_numbers_cannot_be_drawn(low_rank):
    assert np.isinf(low_rank["condition_number_raw"]).all()
    for draw in (plot_trajectory, plot_heatmap):
        with pytest.raises(MissingError, match="condition_number_raw of adapter is infinite"):
            draw(low_rank, "condition_number_raw", kind="adapter")


@pytest.mark.parametrize("metric", dy.METRICS)
def test_every_metric_and_kind_can_be_drawn_in_every_style(both, analysis, low_rank, metric):
    for kind in analysis["kind"].values.tolist():
        axes = [
            plot_trajectory(analysis, metric, kind=kind),
            plot_heatmap(analysis, metric, kind=kind),
            plot_comparison(both, metric, kind=kind),
        ]
        for ax in axes if kind == "update" else ():
            ax.figure.canvas.draw()
        plt.close("all")
    if metric != "condition_number_raw":
        plot_heatmap(low_rank, metric, kind="adapter").figure.canvas.draw()


# Comparisons ------------------------------------------------------------------------------------


def test_a_comparison_draws_means_over_the_layers_and_their_range(both):
    ax = plot_comparison(both, "stable_rank")
    lines = labelled(ax)
    assert list(lines) == ["a", "b"]
    values = both["stable_rank"].sel(kind="weight")
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


def test_a_comparison_of_one_module_shows_only_it(both):
    ax = plot_comparison(both, "stable_rank", module="embed_tokens")
    expected = both["stable_rank"].sel(kind="weight", run="b", matrix="model.embed_tokens.weight")
    np.testing.assert_allclose(labelled(ax)["b"][1], expected, rtol=1e-15)
    assert ax.get_title() == "embed_tokens"


def test_a_run_without_the_kind_is_named_in_the_legend(both):
    ax = plot_comparison(both, "stable_rank", kind="gradient")
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["a", "b (no gradient)"]
    assert labelled(ax)["b (no gradient)"].size == 0


def test_matrices_outside_the_layers_are_compared_where_there_are_no_others(write_recording):
    stores = [write_recording(MemoryStore(), seed=n, shapes={"lm_head": (4, 3)}) for n in (0, 1)]
    both = dy.compare({"a": dy.open_run(stores[0]), "b": dy.open_run(stores[1])})
    assert np.isfinite(labelled(plot_comparison(both))["a"][1]).all()


def test_a_loaded_result_is_drawn_like_the_one_in_memory(both, analysis, tmp_path):
    loaded = dy.load(dy.save(both, tmp_path / "both.zarr"))
    for label, line in labelled(plot_comparison(both)).items():
        np.testing.assert_array_equal(labelled(plot_comparison(loaded))[label], line)
    loaded = dy.load(dy.save(analysis, tmp_path / "a.zarr"))
    for label, line in labelled(plot_spectrum(analysis, UP0)).items():
        np.testing.assert_array_equal(labelled(plot_spectrum(loaded, UP0))[label], line)


def test_differences_are_drawn_with_their_sign_and_say_from_what(both):
    less = dy.difference(both, baseline="a")
    ax = plot_comparison(less, "condition_number")
    drawn = less["condition_number"].sel(run="b", kind="weight", step=STEPS)
    drawn = drawn.sel(matrix=drawn["layer"] >= 0)
    assert (drawn < 0).any()
    np.testing.assert_allclose(labelled(ax)["b"][1], drawn.mean("matrix"), rtol=1e-12)
    assert ax.get_yscale() == "linear"
    assert ax.get_ylabel().endswith(", weight, less a")
    one = dy.select_run(less, "b")
    assert dashed_levels(plot_trajectory(one, "effective_rank")) == []
    assert plot_trajectory(one, "condition_number").get_yscale() == "linear"
    cells = grid(plot_heatmap(one, "condition_number", module="up_proj"))
    expected = one["condition_number"].sel(kind="weight", matrix=[UP0, UP1])
    np.testing.assert_allclose(cells.filled(np.nan), expected.values.T, rtol=1e-12)


# Errors -----------------------------------------------------------------------------------------


def drawing(function, *arguments, **options):
    return lambda data: function(data, *arguments, **options)


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
        (drawing(plot_heatmap, module="lm_head"), "'lm_head'; there are q_proj, up_proj"),
        (drawing(plot_spectrum, "w"), r"No measured weight of 'w'; there are model\.embed"),
        (drawing(plot_spectrum, UP0, kind="base"), "No kind 'base'"),
        (drawing(plot_spectrum, UP0, steps=[11]), "at step 11"),
        (drawing(plot_spectrum, UP0, kind="gradient", steps=[0]), "No gradient of .* at step 0"),
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
def test_what_a_comparison_does_not_have_cannot_be_drawn(both, draw, message):
    with pytest.raises(MissingError, match=message):
        draw(both)
    assert plt.get_fignums() == []


def test_a_kind_of_which_nothing_was_measured_cannot_be_drawn(write_recording):
    run = dy.open_run(write_recording(MemoryStore(), steps=(0,)))
    analysis = dy.analyze(run)
    assert "update" in analysis["kind"].values
    for draw in (plot_trajectory, plot_heatmap):
        with pytest.raises(MissingError, match="No update was measured"):
            draw(analysis, kind="update")


def test_each_figure_says_whether_it_takes_one_run_or_several(both, analysis):
    for draw in (plot_trajectory, plot_heatmap, drawing(plot_spectrum, UP0)):
        with pytest.raises(DynamicsError, match=r"choose one of a, b with \.sel\(run="):
            draw(both)
    with pytest.raises(DynamicsError, match="takes what compare"):
        plot_comparison(analysis)


def test_one_run_of_a_comparison_is_drawn_after_selecting_it(both):
    chosen = both.sel(run="b")
    ax = plot_trajectory(chosen.assign_attrs(events=json.dumps([])), by="matrix")
    np.testing.assert_array_equal(
        labelled(ax)[UP1][1], both["effective_rank"].sel(run="b", kind="weight", matrix=UP1)
    )
