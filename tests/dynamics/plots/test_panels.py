"""Small multiples on one scale."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm

import dynamics as dy
from dynamics.errors import DynamicsError, MissingError
from tests.dynamics.plots.drawn import (
    UP_0,
    heatmap_cells,
    labelled_lines,
    names_at_ends,
    points,
    texts,
)


def test_heatmaps_of_runs_have_one_scale_and_one_bar(study):
    few = study.isel(run=[0, 3, 9])
    axes = dy.plot_panels(dy.plot_heatmap, few, by="run", kind="displacement")
    assert [ax.get_title() for ax in axes] == few["run"].values.tolist()
    norms = {id(ax.collections[0].norm) for ax in axes}
    assert len(norms) == 1
    norm = axes[0].collections[0].norm
    cells = [heatmap_cells(ax) for ax in axes]
    assert norm.vmin == min(each.min() for each in cells)
    assert norm.vmax == max(each.max() for each in cells)
    assert isinstance(norm, LogNorm)  # 4 to 80
    assert "All panels have one logarithmic colour scale." in dy.caption(axes)
    assert len(axes[0].figure.axes) == len(axes) + 1
    alone = dy.plot_heatmap(dy.select_run(few, "lora-seed=0"), kind="displacement")
    np.testing.assert_array_equal(cells[2], heatmap_cells(alone))


def test_zeros_are_hatched_on_a_logarithmic_scale(study):
    few = study.isel(run=[0, 6])  # as published: nothing moves before the first merge
    axes = dy.plot_panels(dy.plot_heatmap, few, by="run", kind="displacement")
    cells = heatmap_cells(axes[1])
    assert (cells == 0).any()
    assert axes[1].collections[0].norm.vmin > 0
    assert "Hatched: zero." in dy.caption(axes)
    assert [ax.patch.get_hatch() for ax in axes] == [None, "/////"]
    rgba = np.asarray(axes[1].collections[0].to_rgba(cells))[cells == 0]
    assert (rgba[:, 3] == 0).all()  # the hatching is seen through it
    linear = dy.plot_panels(dy.plot_heatmap, few, by="run", kind="displacement", log=False)
    assert linear[1].collections[0].norm.vmin == 0


def test_lines_share_their_y_axis_and_are_named_once(study):
    few = study.isel(matrix=np.flatnonzero(study["module"].isin(["q_proj", "v_proj"])))
    axes = dy.plot_panels(dy.plot_comparison, few, by="module", over="seed")
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert names_at_ends(axes[0]) == names_at_ends(axes[1]) == []
    [legend] = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(labelled_lines(axes[0]))
    for ax, module in zip(axes, ("q_proj", "v_proj"), strict=True):
        alone = dy.plot_comparison(study, module=module, over="seed")
        np.testing.assert_array_equal(points(ax, "relora"), points(alone, "relora"))
    assert [text.get_text() for text in texts(axes[0].figure)].count("merge") == 1


@pytest.mark.parametrize(
    ("by", "titles"),
    [
        ("kind", ["weight", "gradient", "update", "displacement"]),
        ("module", ["embed_tokens", "up_proj", "q_proj"]),
        ("layer", ["layer 0", "layer 1"]),
        ("component", ["parameters"]),
    ],
)
def test_panels_by_parts_of_one_run(analysis, by, titles):
    axes = dy.plot_panels(dy.plot_trajectory, analysis, "stable_rank", by=by)
    assert [ax.get_title() for ax in axes][: len(titles)] == titles


def test_panels_by_expert(analysis):
    experts = analysis.assign_coords(expert=("matrix", [-1, 1, 1, 0, 0]))
    axes = dy.plot_panels(dy.plot_trajectory, experts, by="expert")
    assert [ax.get_title() for ax in axes] == ["expert 0", "expert 1"]


def test_own_functions_and_own_axes(analysis):
    def draw(dataset, name, ax):
        dataset[name].sel(kind="weight").mean("matrix").plot(ax=ax)
        return ax

    figure, axes = plt.subplots(2, 2)
    used = dy.plot_panels(draw, analysis, "stable_rank", by="layer", axes=axes)
    assert used.tolist() == axes.ravel()[:2].tolist()
    assert plt.get_fignums() == [figure.number]
    assert dy.caption(used) == "Panels: layer 0 and layer 1."


def test_spectra_of_runs_are_on_one_scale(cycles):
    both = dy.compare(
        {"a": cycles, "b": cycles.assign(singular_value=cycles["singular_value"] * 10)}
    )
    axes = dy.plot_panels(dy.plot_spectra_over_time, both, UP_0, by="run", kind="displacement")
    low, high = (
        {ax.collections[0].norm.vmin for ax in axes},
        {ax.collections[0].norm.vmax for ax in axes},
    )
    alone = [
        dy.plot_spectra_over_time(dy.select_run(both, run), UP_0, kind="displacement")
        for run in ("a", "b")
    ]
    assert low == {min(ax.collections[0].norm.vmin for ax in alone)}
    assert high == {max(ax.collections[0].norm.vmax for ax in alone)}


def test_what_panels_cannot_use_is_refused(analysis, study):
    for options, message in (
        ({"by": "run"}, "this result is of one"),
        ({"by": "kind", "kind": "weight"}, "Panels by kind draw every kind"),
        ({"by": "layer", "columns": 0}, "columns is 0"),
        ({"by": "layer", "axes": np.array([plt.figure().add_subplot()])}, "2 panels need"),
    ):
        with pytest.raises(DynamicsError, match=message):
            dy.plot_panels(dy.plot_trajectory, analysis, **options)
    with pytest.raises(MissingError, match=r"No panels by 'layers'.*did you mean 'layer'"):
        dy.plot_panels(dy.plot_trajectory, analysis, by="layers")
    with pytest.raises(MissingError, match="No expert in this result"):
        dy.plot_panels(dy.plot_trajectory, analysis, by="expert")
    many = analysis.isel(matrix=[1] * 40).assign_coords(layer=("matrix", list(range(40))))
    with pytest.raises(DynamicsError, match="40 panels are too many"):
        dy.plot_panels(dy.plot_trajectory, many, by="layer")


def test_panels_below_which_nothing_stands_name_their_axis(study):
    axes = dy.plot_panels(dy.plot_comparison, study.isel(run=[0, 3]), by="module", columns=4)
    named = [bool(ax.get_xlabel()) for ax in axes]
    assert len(axes) == 10
    assert named == [False] * 6 + [True] * 4
