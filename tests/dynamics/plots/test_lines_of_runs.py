"""Differences of runs, overlaps, and the loss above ranks."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from tests.dynamics.plots.drawn import STEPS, band, labelled_lines, points, vertical_lines

# Differences -------------------------------------------------------------------------------------


def test_differences_are_paired_and_have_the_interval_of_the_pairs(study):
    ax = dy.plot_difference(study, baseline="full_rank", over="seed")
    assert list(labelled_lines(ax)) == ["relora", "relora-as_published", "lora"]
    values = study["effective_rank"].sel(kind="weight").astype(np.float64)
    means = values.sel(matrix=(values["layer"] >= 0) & (values["component"] == "parameters")).mean(
        "matrix"
    )
    for number, run in enumerate(labelled_lines(ax)):
        pairs = [
            means.sel(run=f"{run}-seed={seed}", drop=True)
            - means.sel(run=f"full_rank-seed={seed}", drop=True)
            for seed in (0, 1, 2)
        ]
        less = xr.concat(pairs, "pair")
        np.testing.assert_allclose(points(ax, run)[1], less.mean("pair"), rtol=1e-4, atol=1e-5)
        half = 4.302652729911275 * less.std("pair", ddof=1) / np.sqrt(3)
        low, high = band(ax, number)[560]
        np.testing.assert_allclose((high - low) / 2, half.sel(step=560), rtol=1e-3)
    [zero] = [line for line in ax.get_lines() if line.get_label() == "_zero"]
    assert set(zero.get_ydata()) == {0}
    assert "less that of full_rank" in dy.caption(ax)
    assert "over 3 seeds" in dy.caption(ax)


def test_a_difference_that_was_made_before_is_drawn_as_it_is(comparison):
    less = dy.difference(comparison, baseline="a")
    one = dy.plot_difference(less, "stable_rank")
    other = dy.plot_difference(comparison, "stable_rank", baseline="a")
    np.testing.assert_array_equal(points(one, "b"), points(other, "b"))


def test_differences_of_pairs_that_were_made_before_have_the_same_interval(study):
    less = dy.difference(study.drop_vars("singular_value"), baseline="full_rank", pair="seed")
    one = dy.plot_difference(less, over="seed")
    other = dy.plot_difference(study, baseline="full_rank", over="seed")
    for number, run in enumerate(labelled_lines(other)):
        np.testing.assert_array_equal(points(one, run), points(other, run))
        assert band(one, number) == band(other, number)


def test_differences_need_one_baseline(comparison, analysis):
    with pytest.raises(DynamicsError, match=r"Give baseline \(--baseline\), one of a, b"):
        dy.plot_difference(comparison)
    with pytest.raises(DynamicsError, match="is less 'a' already"):
        dy.plot_difference(dy.difference(comparison, baseline="a"), baseline="a")
    with pytest.raises(MissingError, match="No run 'c'"):
        dy.plot_difference(comparison, baseline="c")
    with pytest.raises(DynamicsError, match="plot_difference takes"):
        dy.plot_difference(analysis, baseline="a")
    assert plt.get_fignums() == []


# Overlaps ----------------------------------------------------------------------------------------

NAMES = ["layers.0.q.weight", "layers.0.up.weight", "layers.1.q.weight"]


@pytest.fixture
def overlaps():
    """Of a run with 3 matrices and 2 kinds; k is 4."""
    rng = np.random.default_rng(0)
    dims = ("kind", "step", "matrix")
    names = ("left_overlap_with_weight", "right_overlap_with_weight", "energy_in_weight",
             "left_overlap_with_last_cycle", "right_overlap_with_last_cycle")  # fmt: skip
    found = xr.Dataset({name: (dims, rng.uniform(size=(2, 3, 3))) for name in names})
    found[names[3]][0] = found[names[4]][0] = np.nan
    return found.assign_attrs(directions=4).assign_coords(
        kind=["update", "adapter"],
        step=[0, 5, 9],
        matrix=NAMES,
        layer=("matrix", [0, 0, 1]),
        module=("matrix", ["q", "up", "q"]),
        component=("matrix", ["parameters"] * 3),
        rows=("matrix", [8, 16, 8]),
        cols=("matrix", [8, 8, 8]),
    )


def test_overlaps_are_means_over_matrices_of_both_sides(overlaps):
    ax = dy.plot_overlaps(overlaps, kind="adapter", module="q")
    for side in ("left", "right"):
        values = overlaps[f"{side}_overlap_with_weight"].sel(kind="adapter")
        expected = values.isel(matrix=[0, 2]).mean("matrix")
        np.testing.assert_allclose(points(ax, side), [[0, 5, 9], expected], rtol=1e-12)
    low, high = band(ax, 0)[5]
    both = overlaps["left_overlap_with_weight"].sel(kind="adapter", step=5).values[[0, 2]]
    np.testing.assert_allclose((low, high), (both.min(), both.max()))
    assert ax.get_ylim() == (0, 1.02)


def test_random_subspaces_overlap_by_k_of_n(overlaps):
    ax = dy.plot_overlaps(overlaps)
    levels = [line.get_ydata()[0] for line in ax.get_lines() if line.get_label() == "_random"]
    assert levels == [pytest.approx((4 / 8 + 4 / 16 + 4 / 8) / 3), pytest.approx(4 / 8)]
    assert "Dashed: the mean overlap of random subspaces, k / n." in dy.caption(ax)
    # An adapter has r directions, which the result does not tell.
    cycle = dy.plot_overlaps(overlaps, "last_cycle")
    assert not [line for line in cycle.get_lines() if line.get_label() == "_random"]


def test_the_first_kind_with_values_is_drawn(overlaps):
    assert dy.plot_overlaps(overlaps).get_ylabel() == "overlap with the weight, update"
    cycle = dy.plot_overlaps(overlaps, "last_cycle")
    assert cycle.get_ylabel() == "overlap with the last cycle, adapter"


def test_overlaps_of_two_runs(write_recording):
    from zarr.storage import MemoryStore

    stores = [write_recording(MemoryStore(), seed=seed) for seed in (0, 1)]
    found = dy.run_alignment(*map(dy.open_run, stores), kind="displacement", k=3)
    ax = dy.plot_overlaps(found)
    values = found["left_overlap"].sel(kind="displacement").dropna("step", how="all")
    inside = values.sel(matrix=values["layer"] >= 0).mean("matrix")
    np.testing.assert_allclose(points(ax, "left"), [STEPS[1:], inside], rtol=1e-12)
    levels = [line.get_ydata()[0] for line in ax.get_lines() if line.get_label() == "_random"]
    assert levels == [pytest.approx((3 / 8 + 3 / 16) / 2), pytest.approx(3 / 8)]
    cosine = dy.plot_overlaps(found, "alignment")
    assert cosine.get_ylim()[0] < 0
    fewer = found.assign(subspace_dimension=found["subspace_dimension"] - 1)
    assert "fewer than 3 directions" in dy.caption(dy.plot_overlaps(fewer))


def test_shares_of_gradients_and_intruders(write_recording):
    from zarr.storage import MemoryStore

    run = dy.open_run(write_recording(MemoryStore(), steps=(0, 10, 20, 30)))
    found = dy.gradient_subspaces(run, k=2)
    ax = dy.plot_overlaps(found)
    assert list(labelled_lines(ax)) == ["its own", "record before", "first record"]
    inside = found.sel(kind="gradient", matrix=found["layer"] >= 0).mean("matrix")
    np.testing.assert_allclose(
        points(ax, "record before"), [[20, 30], inside["energy_in_last"].dropna("step")], rtol=1e-12
    )
    [chance] = [line.get_ydata()[0] for line in ax.get_lines() if line.get_label() == "_random"]
    assert chance == pytest.approx(2 / 8)
    with_projector = dy.plot_overlaps(found.assign(energy_in_projector=found["energy"]))
    assert "projector" in labelled_lines(with_projector)
    assert "and those of the projector in use" in dy.caption(with_projector)
    assert dy.plot_overlaps(found, "turning").get_ylabel().startswith("overlap with earlier")
    new = dy.intruders(run, since=0, k=3)
    ax = dy.plot_overlaps(new)
    values = new["intruders"].sel(kind="weight", matrix=new["layer"] >= 0).mean("matrix")
    np.testing.assert_allclose(points(ax, "the run")[1], values.dropna("step"), rtol=1e-12)
    assert ax.get_ylim()[1] >= 3


def test_overlaps_refuse_what_they_do_not_have(overlaps, analysis):
    with pytest.raises(DynamicsError, match="takes what subspace_overlaps"):
        dy.plot_overlaps(analysis)
    with pytest.raises(MissingError, match="No 'runs' in this result; it has weight, last_cycle"):
        dy.plot_overlaps(overlaps, "runs")
    with pytest.raises(MissingError, match="No update was measured"):
        dy.plot_overlaps(overlaps, "last_cycle", kind="update")
    with pytest.raises(MissingError, match="of a module 'k'"):
        dy.plot_overlaps(overlaps, module="k")


# The loss ----------------------------------------------------------------------------------------


def test_the_loss_and_a_metric_have_one_time_axis(comparison):
    upper = dy.plot_loss(comparison, "stable_rank", x="tokens")
    lower = upper.figure.axes[-1]
    np.testing.assert_array_equal(points(upper, "a"), [[640, 1280], [4, 3]])
    expected = points(dy.plot_comparison(comparison, "stable_rank", x="tokens"), "a")
    np.testing.assert_array_equal(points(lower, "a"), expected)
    assert upper.get_xlim() == lower.get_xlim()
    assert upper.get_shared_x_axes().joined(upper, lower)  # also after zooming
    assert vertical_lines(upper) == vertical_lines(lower) == [640, 1280, 1920]
    assert (upper.get_xlabel(), lower.get_xlabel()) == ("", "tokens")
    assert [each.get_ylabel() for each in (upper, lower)] == ["loss", "stable rank, weight"]


def test_the_loss_of_one_run_stands_above_the_mean_of_its_layers(analysis):
    upper = dy.plot_loss(analysis)
    lower = upper.figure.axes[-1]
    np.testing.assert_array_equal(points(upper, "loss"), [STEPS[1:], [4, 3]])
    values = analysis["effective_rank"].sel(kind="weight")
    expected = values.sel(matrix=values["layer"] >= 0).mean("matrix")
    np.testing.assert_allclose(points(lower, "mean")[1], expected, rtol=1e-12)


def test_losses_of_seeds_have_intervals(study):
    ax = dy.plot_loss(study, metric=None, over="seed", loss="eval_loss")
    values = study["eval_loss"].sel(run=[f"lora-seed={n}" for n in (0, 1, 2)]).dropna("step")
    values = values.astype(np.float64)
    np.testing.assert_allclose(points(ax, "lora"), [values["step"], values.mean("run")], rtol=1e-12)
    half = 4.302652729911275 * values.std("run", ddof=1) / np.sqrt(3)
    low, high = band(ax, 3)[560]
    np.testing.assert_allclose((high - low) / 2, half.sel(step=560), rtol=1e-9)


def test_the_given_axes_are_divided(analysis):
    figure, (left, right) = plt.subplots(1, 2)
    assert dy.plot_loss(analysis, ax=right) is right
    figure.canvas.draw()
    lower = figure.axes[-1]
    assert not left.has_data()
    assert lower.get_position().y1 < right.get_position().y0
    assert lower.get_position().x0 == pytest.approx(right.get_position().x0)
    free = plt.figure().add_axes((0.1, 0.1, 0.8, 0.8))
    with pytest.raises(DynamicsError, match="stand in no grid"):
        dy.plot_loss(analysis, ax=free)


def test_what_was_not_logged_cannot_be_drawn(analysis):
    with pytest.raises(MissingError, match=r"No 'los'.*did you mean 'loss'.*was logged"):
        dy.plot_loss(analysis, loss="los")
    with pytest.raises(MissingError, match="No loss was logged in this run; it has tokens"):
        dy.plot_loss(analysis.drop_vars("loss"))
    with pytest.raises(DynamicsError, match=r"over .* is for several runs"):
        dy.plot_loss(analysis, over="seed")
    with pytest.raises(DynamicsError, match="kind and module are of the metric"):
        dy.plot_loss(analysis, metric=None, module="q_proj")
    with pytest.raises(MissingError, match="No metric 'er'"):
        dy.plot_loss(analysis, "er")
    assert plt.get_fignums() == []
