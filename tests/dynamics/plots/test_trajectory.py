"""Metrics over training, of one run."""

import json

import numpy as np
import pytest
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from dynamics.plots import plot_heatmap, plot_trajectory
from tests.dynamics.plots.drawn import (
    STEPS,
    UP_0,
    UP_1,
    band,
    dashed_levels,
    labelled_lines,
    names_at_ends,
    points,
    vertical_lines,
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
    np.testing.assert_array_equal(lines[UP_1], [STEPS[1:], values[1:]])  # no update at step 0


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


def test_a_bound_that_is_only_a_size_does_not_flatten_the_lines(relora):
    for module, drawn in (("q_proj", "lies above the axes"), ("v_proj", "lies above the axes")):
        of_module = relora.isel(matrix=np.flatnonzero(relora["module"] == module))
        ax = plot_trajectory(of_module)
        values = of_module["effective_rank"].sel(kind="weight")
        assert ax.get_ylim()[1] < float(values.max()) + 5
        assert drawn in dy.caption(ax)


def test_up_to_sixteen_lines_are_named_at_their_ends_and_more_are_coloured_by_layer(
    write_recording,
):
    for layers in (16, 17):
        shapes = {f"model.layers.{layer}.mlp.up_proj.weight": (2, 2) for layer in range(layers)}
        analysis = dy.analyze(write_recording(MemoryStore(), steps=(0,), shapes=shapes))
        ax = plot_trajectory(analysis, by="layer")
        assert len(labelled_lines(ax)) == layers
        names = [name for name in names_at_ends(ax) if name.startswith("layer")]
        assert names == ([f"layer {n}" for n in range(16)] if layers == 16 else [])
        assert ("17 lines are coloured by layer" in dy.caption(ax)) == (layers == 17)
        assert (ax.figure.axes[-1].get_ylabel() == "layer") == (layers == 17)


def test_many_matrices_have_the_colours_of_their_layers(relora):
    ax = plot_trajectory(relora, by="matrix")
    colours = {name: line.get_color() for line in ax.get_lines() if (name := line.get_label())}
    layer = dict(zip(relora["matrix"].values, relora["layer"].values.tolist(), strict=True))
    drawn = {name: tuple(np.ravel(colour)) for name, colour in colours.items() if name in layer}
    assert len(drawn) == 34
    by_layer = {number: {drawn[n] for n in drawn if layer[n] == number} for number in (0, 1, 2, 3)}
    assert [len(each) for each in by_layer.values()] == [1] * 4
    assert len(set.union(*by_layer.values())) == 4


def test_bands_are_the_range_of_the_layers(relora):
    few = relora.isel(matrix=np.flatnonzero(relora["module"].isin(["q_proj", "k_proj"])))
    ax = plot_trajectory(few)
    for number, module in enumerate(dict.fromkeys(few["module"].values.tolist())):
        values = few["effective_rank"].sel(kind="weight", matrix=few["module"] == module)
        assert values.sizes["matrix"] == 4
        found = band(ax, number)
        for step in (0, 80, 560):
            at = values.sel(step=step).astype(np.float64)
            np.testing.assert_allclose(found[step], (at.min(), at.max()), rtol=1e-12)
    assert "Bands: the range of 4 layers." in dy.caption(ax)
    assert not plot_trajectory(few, band=False).collections
    assert not plot_trajectory(relora).collections  # nine modules
    assert len(plot_trajectory(relora, by="layer", band=True).collections) == 4
    assert "the range of 7 matrices" in dy.caption(plot_trajectory(relora, by="layer", band=True))


def test_a_band_of_single_matrices_is_refused(analysis):
    with pytest.raises(DynamicsError, match="by='matrix' has one for each"):
        plot_trajectory(analysis, by="matrix", band=True)


def test_lines_of_adapters_are_broken_at_merges(relora):
    ax = plot_trajectory(relora, kind="adapter", by="layer")
    [line] = [each for each in ax.get_lines() if each.get_label() == "layer 2"]
    x, y = (np.asarray(each, dtype=float) for each in line.get_data())
    cycles = [x[part].tolist() for part in np.ma.clump_unmasked(np.ma.masked_invalid(y))]
    assert cycles[0] == [0, 20, 40, 60, 80]  # the record of a merge holds what was merged
    assert cycles[1] == [100, 120, 140, 160]
    assert len(cycles) == 7
    values = relora["effective_rank"].sel(kind="adapter", matrix=relora["layer"] == 2)
    expected = values.mean("matrix", dtype=np.float64)
    np.testing.assert_allclose(points(ax, "layer 2")[1], expected, rtol=1e-6)
    [whole] = [
        e for e in plot_trajectory(relora, by="layer").get_lines() if e.get_label() == "layer 2"
    ]
    assert np.isfinite(whole.get_ydata()).all()


def test_condition_numbers_have_geometric_means(analysis):
    line = labelled_lines(plot_trajectory(analysis, "condition_number"))["up_proj"]
    values = analysis["condition_number"].sel(kind="weight", matrix=[UP_0, UP_1])
    np.testing.assert_allclose(line[1], np.sqrt(values.prod("matrix")), rtol=1e-12)
    assert "geometric mean" in dy.caption(plot_trajectory(analysis, "condition_number"))


def test_the_axis_is_steps_tokens_or_epochs_as_the_result_has_them(analysis, relora):
    lines = labelled_lines(plot_trajectory(analysis, x="tokens"))
    np.testing.assert_array_equal(lines["up_proj"][0], [64 * step for step in STEPS])
    ax = plot_trajectory(relora, x="tokens")
    assert points(ax, "q_proj")[0].tolist() == [2048 * step for step in range(0, 561, 20)]
    assert vertical_lines(ax) == [2048 * step for step in range(80, 481, 80)]
    assert ax.get_xlabel() == "tokens"
    epochs = analysis.assign(epoch=("step", [np.nan, np.nan, 0.5]))
    ax = plot_trajectory(epochs, x="epoch")
    # Nothing was consumed before step 0; half of the way to step 20 is half of its epochs.
    np.testing.assert_array_equal(labelled_lines(ax)["up_proj"][0], [0, 0.25, 0.5])
    with pytest.raises(MissingError, match=r"No 'epoch' to draw along.*it has step, tokens"):
        plot_trajectory(analysis, x="epoch")
    with pytest.raises(MissingError, match="did you mean 'tokens'"):
        plot_trajectory(analysis, x="token")


def test_what_lies_beyond_the_known_tokens_is_not_drawn(analysis):
    known = analysis.assign(tokens=("step", [0.0, 640.0, np.nan]))
    line = labelled_lines(plot_trajectory(known, x="tokens"))["up_proj"]
    assert line[0][:2].tolist() == [0, 640]
    assert np.isnan(line[0][2])


def test_experts_are_lines_where_there_are_any(analysis):
    with pytest.raises(MissingError, match="No weight of a routed expert"):
        plot_trajectory(analysis, by="expert")
    experts = analysis.assign_coords(expert=("matrix", [-1, 0, 0, 1, 1]))
    lines = labelled_lines(plot_trajectory(experts, by="expert"))
    assert list(lines) == ["expert 0", "expert 1"]
    values = analysis["effective_rank"].sel(kind="weight")
    np.testing.assert_allclose(lines["expert 1"][1], values[:, 3:].mean("matrix"), rtol=1e-12)


def test_encoders_and_decoders_are_not_averaged_together(analysis):
    both = analysis.assign_coords(
        stack=("matrix", ["", "encoder", "encoder", "decoder", "decoder"])
    )
    both = both.assign_coords(layer=("matrix", [-1, 0, 0, 0, 0]))
    assert set(labelled_lines(plot_trajectory(both, by="layer"))) == {
        "encoder layer 0",
        "decoder layer 0",
    }
    assert "encoder.up_proj" in labelled_lines(plot_trajectory(both))


def test_a_line_under_another_is_shown_and_told(analysis):
    same = analysis.copy(deep=True)
    for metric in ("effective_rank",):
        values = same[metric].sel(kind="weight", matrix=UP_0)
        same[metric].loc[{"kind": "weight", "matrix": UP_1}] = values
    ax = plot_trajectory(same, by="matrix")
    assert f"The lines of {UP_0} and {UP_1} lie on each other." in dy.caption(ax)
    [below] = [line for line in ax.get_lines() if line.get_label() == "_below"]
    [above] = [line for line in ax.get_lines() if line.get_label() == UP_1]
    assert below.get_linewidth() > 2 * above.get_linewidth()
    assert "lie on each other" not in dy.caption(plot_trajectory(analysis, by="matrix"))


def test_products_of_matrices_do_not_count_as_matrices_of_a_layer(relora):
    assert "pico_ov_circuit" in relora["module"].values
    line = points(plot_trajectory(relora, by="layer"), "layer 1")
    values = relora["effective_rank"].sel(kind="weight", matrix=relora["layer"] == 1)
    parameters = values.sel(matrix=values["component"] == "parameters")
    assert (values.sizes["matrix"], parameters.sizes["matrix"]) == (8, 7)
    np.testing.assert_allclose(line[1], parameters.mean("matrix", dtype=np.float64), rtol=1e-6)


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
