"""A metric of several runs."""

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.plots import plot_comparison, plot_heatmap, plot_trajectory
from tests.dynamics.plots.drawn import (
    STEPS,
    UP_0,
    UP_1,
    band,
    dashed_levels,
    heatmap_cells,
    labelled_lines,
    names_at_ends,
    points,
    vertical_lines,
)


def test_a_comparison_draws_means_and_the_range_of_the_layers(comparison):
    ax = plot_comparison(comparison, "stable_rank")
    lines = labelled_lines(ax)
    assert list(lines) == ["a", "b"]
    values = comparison["stable_rank"].sel(kind="weight")
    values = values.sel(matrix=values["layer"] >= 0)
    assert values.sizes["matrix"] == 4
    layers = values.groupby("layer").mean("matrix")
    for number, (label, steps) in enumerate(zip("ab", (STEPS, [*STEPS, 30]), strict=True)):
        of_run = values.sel(run=label, step=steps)
        np.testing.assert_array_equal(lines[label][0], steps)
        np.testing.assert_allclose(lines[label][1], of_run.mean("matrix"), rtol=1e-15)
        for step, ends in band(ax, number).items():
            at = layers.sel(run=label, step=step)
            np.testing.assert_allclose(ends, (at.min(), at.max()), rtol=1e-12)
    assert "Each line is the mean over 4 matrices. Bands: the range of 2 layers" in dy.caption(ax)


def test_seeds_are_averaged_after_the_matrices_of_each_run(study):
    ax = plot_comparison(study, over="seed")
    assert list(labelled_lines(ax)) == ["full_rank", "relora", "relora-as_published", "lora"]
    values = study["effective_rank"].sel(kind="weight").astype(np.float64)
    inside = values.sel(matrix=(values["layer"] >= 0) & (values["component"] == "parameters"))
    assert inside.sizes["matrix"] == 28
    means = inside.mean("matrix")
    for number, run in enumerate(labelled_lines(ax)):
        of_run = means.sel(run=[f"{run}-seed={seed}" for seed in (0, 1, 2)])
        np.testing.assert_allclose(points(ax, run)[1], of_run.mean("run"), rtol=1e-12)
        half = 4.302652729911275 * of_run.std("run", ddof=1) / np.sqrt(3)
        found = band(ax, number)
        for step in (0, 100, 560):
            middle, width = float(of_run.mean("run").sel(step=step)), float(half.sel(step=step))
            np.testing.assert_allclose(found[step], (middle - width, middle + width), rtol=1e-9)
    assert "95 % confidence interval of the mean over 3 seeds (t = 4.30)" in dy.caption(ax)


def test_intervals_of_geometric_means_are_those_of_logarithms(study):
    ax = plot_comparison(study, "condition_number", module="q_proj", over="seed")
    values = study["condition_number"].sel(kind="weight", matrix=study["module"] == "q_proj")
    logs = np.log(values.astype(np.float64)).mean("matrix")
    of_run = logs.sel(run=[f"relora-seed={seed}" for seed in (0, 1, 2)])
    np.testing.assert_allclose(points(ax, "relora")[1], np.exp(of_run.mean("run")), rtol=1e-9)
    half = 4.302652729911275 * of_run.std("run", ddof=1) / np.sqrt(3)
    low, high = np.exp(of_run.mean("run") - half), np.exp(of_run.mean("run") + half)
    np.testing.assert_allclose(band(ax, 1)[560], (low.sel(step=560), high.sel(step=560)), rtol=1e-9)


def test_a_run_has_its_colour_in_every_figure(study):
    drawn = {
        "all": plot_comparison(study),
        "over": plot_comparison(study, over="seed"),
        "two": plot_comparison(study.isel(run=[9, 4])),
        "one kind": plot_comparison(study, kind="adapter"),
        "less": dy.plot_difference(study, baseline="full_rank", over="seed"),
        "less one": dy.plot_difference(study, baseline="full_rank-seed=0"),
        "stairs": dy.plot_staircase(study, over="seed"),
        "loss": dy.plot_loss(study, metric=None),
    }
    colours = {}
    for ax in drawn.values():
        for line in ax.get_lines():
            name = str(line.get_label()).partition("-seed=")[0]
            if name in ("full_rank", "relora", "relora-as_published", "lora"):
                colours.setdefault(name, set()).add(line.get_color())
    assert colours == {
        "full_rank": {"#0072B2"},
        "relora": {"#D55E00"},
        "relora-as_published": {"#009E73"},
        "lora": {"#CC79A7"},
    }


def test_runs_beyond_four_have_dashes(comparison):
    runs = {name: comparison.sel(run="a", drop=True) for name in "abcdefgh"}
    eight = xr.concat(list(runs.values()), xr.Variable("run", list(runs)))
    lines = [
        line
        for line in plot_comparison(eight.drop_attrs(), "stable_rank").get_lines()
        if line.get_label() in runs
    ]
    styles = {(line.get_color(), str(line._dash_pattern)) for line in lines}
    assert len(styles) == 8
    assert len({line.get_color() for line in lines}) == 4


def test_settings_of_runs_have_colours_of_their_own_and_only_seeds_share_one(comparison):
    for names, colours in ((("lr=0.1", "lr=0.2"), 2), (("a-seed=0", "a-seed=1"), 1)):
        two = comparison.assign_coords(run=list(names)).drop_attrs()
        lines = [each for each in plot_comparison(two).get_lines() if each.get_label() in names]
        assert len({each.get_color() for each in lines}) == colours
        assert len({(each.get_color(), str(each._dash_pattern)) for each in lines}) == 2


def test_each_run_lies_at_its_own_tokens(comparison):
    twice = comparison.copy(deep=True)
    twice["tokens"].loc[{"run": "b"}] *= 2
    ax = plot_comparison(twice, x="tokens")
    np.testing.assert_array_equal(points(ax, "a")[0], [0, 640, 1280])
    np.testing.assert_array_equal(points(ax, "b")[0], [0, 1280, 2560, 3840])
    assert vertical_lines(ax) == [640, 1280, 3840]  # a merges at 10 and 20, b at 30


def test_runs_at_different_tokens_have_no_mean(study):
    other = study.copy(deep=True)
    other["tokens"].loc[{"run": "relora-seed=1"}] *= 2
    with pytest.raises(DynamicsError, match="not at the same tokens"):
        plot_comparison(other, over="seed", x="tokens")
    assert plot_comparison(other, over="seed").has_data()


def test_the_caption_says_whose_merges_are_marked(study):
    assert "Dotted: the 6 merges of relora and relora-as_published." in dy.caption(
        plot_comparison(study, over="seed")
    )
    assert "of 6 of 12 runs." in dy.caption(plot_comparison(study))


def test_means_that_were_made_before_are_refused(study):
    with pytest.raises(DynamicsError, match="give it the comparison itself, and over='seed'"):
        plot_comparison(dy.over(study, "seed"))
    with pytest.raises(MissingError, match="No setting 'size'"):
        plot_comparison(study, over="size")


def test_a_comparison_of_one_module_shows_only_it(comparison):
    ax = plot_comparison(comparison, "stable_rank", module="embed_tokens")
    expected = comparison["stable_rank"].sel(
        kind="weight", run="b", matrix="model.embed_tokens.weight"
    )
    np.testing.assert_allclose(labelled_lines(ax)["b"][1], expected, rtol=1e-15)
    assert ax.get_title() == "embed_tokens"


def test_a_run_without_the_kind_is_named(comparison, study):
    ax = plot_comparison(comparison, "stable_rank", kind="gradient")
    assert names_at_ends(ax) == ["a", "b (no gradient)"]
    assert labelled_lines(ax)["b (no gradient)"].size == 0
    ax = plot_comparison(study, kind="adapter", over="seed")
    assert "full_rank (no adapter)" in names_at_ends(ax)


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
