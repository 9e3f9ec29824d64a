"""On paper and on slides: sizes, fonts, nothing cut off, nothing on top of each other, captions."""

from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.plots.drawing.labels import apart
from tests.dynamics.plots.drawn import UP_0, texts

LONG = "condition_number"  # the metric with the longest name, on a logarithmic axis

FIGURES = {
    "modules": lambda s, r, c: dy.plot_trajectory(r),
    "layers": lambda s, r, c: dy.plot_trajectory(r, by="layer", x="tokens"),
    "matrices": lambda s, r, c: dy.plot_trajectory(r, by="matrix"),
    "adapters": lambda s, r, c: dy.plot_trajectory(r, kind="adapter", by="layer"),
    "long name": lambda s, r, c: dy.plot_trajectory(r, LONG, by="layer"),
    "seeds": lambda s, r, c: dy.plot_comparison(s, over="seed"),
    "twelve runs": lambda s, r, c: dy.plot_comparison(s),
    "missing": lambda s, r, c: dy.plot_comparison(s, kind="adapter", over="seed"),
    "difference": lambda s, r, c: dy.plot_difference(s, LONG, baseline="full_rank", over="seed"),
    "heatmap": lambda s, r, c: dy.plot_heatmap(r, "proportional_effective_rank"),
    "staircase": lambda s, r, c: dy.plot_staircase(s, over="seed"),
    "staircase of one": lambda s, r, c: dy.plot_staircase(r),
    "budget": lambda s, r, c: dy.plot_rank_budget(r),
    "budget of runs": lambda s, r, c: dy.plot_rank_budget(s),
    "loss": lambda s, r, c: dy.plot_loss(s, over="seed", x="tokens"),
    "loss of one": lambda s, r, c: dy.plot_loss(r),
    "spectrum": lambda s, r, c: dy.plot_spectrum(c, UP_0, kind="displacement"),
    "spectrum of weights": lambda s, r, c: dy.plot_spectrum(c, UP_0),
    "spectrum of one step": lambda s, r, c: dy.plot_spectrum(r, r["matrix"].values[2],
                                                             kind="displacement"),
    "spectra": lambda s, r, c: dy.plot_spectra_over_time(c, UP_0, kind="displacement"),
}  # fmt: skip
PANELS = {
    "heatmaps": lambda s: dy.plot_panels(
        dy.plot_heatmap, s.isel(run=[0, 3, 6, 9]), by="run", kind="displacement"
    ),
    "modules": lambda s: dy.plot_panels(dy.plot_comparison, s, by="module", over="seed"),
    "kinds": lambda s: dy.plot_panels(dy.plot_comparison, s, by="kind", over="seed"),
}


def check(figure):
    """Every text is on the canvas, and no two overlap."""
    found = texts(figure)
    assert len(found) > 4
    canvas = figure.bbox
    boxes = list(found.items())
    for text, box in boxes:
        inside = (
            box.x0 >= -0.5,
            box.y0 >= -0.5,
            box.x1 <= canvas.x1 + 0.5,
            box.y1 <= canvas.y1 + 0.5,
        )
        assert all(inside), (text.get_text(), box.extents, canvas.extents)
    for number, (text, box) in enumerate(boxes):
        for other, others in boxes[:number]:
            wide = min(box.x1, others.x1) - max(box.x0, others.x0)
            tall = min(box.y1, others.y1) - max(box.y0, others.y0)
            # Boxes of lines of text touch; letters do not.
            assert wide < 1 or tall < 0.2 * min(box.height, others.height), (
                text.get_text(),
                other.get_text(),
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("style", ["paper", "slides"])
def test_nothing_is_cut_off_and_no_two_texts_overlap(study, relora, cycles, name, style):
    with dy.figure_style(style):
        ax = FIGURES[name](study, relora, cycles)
        assert ax.figure.get_size_inches()[0] == (3.4 if style == "paper" else 10)
        check(ax.figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", PANELS)
def test_panels_of_a_page_have_room_for_their_texts(study, name):
    with dy.figure_style("paper", width="page"):
        check(PANELS[name](study)[0].figure)


def test_labels_are_found_where_they_are_cut_off_or_overlap(relora):
    """The check itself can fail."""
    with dy.figure_style():
        ax = dy.plot_trajectory(relora)
        ax.text(1.5, 0.5, "beyond", transform=ax.transAxes).set_in_layout(False)
        with pytest.raises(AssertionError, match="beyond"):
            check(ax.figure)
        ax = dy.plot_trajectory(relora)
        for _ in range(2):
            ax.text(0.5, 0.5, "twice", transform=ax.transAxes)
        with pytest.raises(AssertionError, match="twice"):
            check(ax.figure)


def test_figures_of_a_user_without_a_layout_get_one(relora):
    figure, axes = plt.subplots(1, 2, figsize=(6.75, 3))
    assert figure.get_layout_engine() is None
    for ax, by in zip(axes, ("layer", "module"), strict=True):
        dy.plot_trajectory(relora, by=by, ax=ax)
    found = texts(figure)
    assert max(box.x1 for box in found.values()) <= figure.bbox.x1
    own, ax = plt.subplots(layout="tight")
    engine = own.get_layout_engine()
    dy.plot_trajectory(relora, ax=ax)
    assert own.get_layout_engine() is engine


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_pushed_apart_as_little_as_can_be(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.uniform(0, 100, size=6).tolist()
    heights = rng.uniform(4, 9, size=6).tolist()
    found = apart(wanted, heights, 0, 100)
    order = np.argsort(found)
    for a, b in pairwise(order):
        assert found[b] - found[a] >= (heights[a] + heights[b]) / 2 - 1e-6
    assert min(f - h / 2 for f, h in zip(found, heights, strict=True)) >= -1e-6
    assert max(f + h / 2 for f, h in zip(found, heights, strict=True)) <= 100 + 1e-6
    assert np.argsort(wanted).tolist() == order.tolist()
    from scipy.optimize import minimize

    gaps = [(heights[a] + heights[b]) / 2 for a, b in pairwise(order)]
    best = minimize(
        lambda y: ((y - wanted) ** 2).sum(),
        np.array(found),
        constraints=[
            *({"type": "ineq", "fun": lambda y, a=a, b=b, g=g: y[b] - y[a] - g}
              for a, b, g in zip(order[:-1], order[1:], gaps, strict=True)),
            {"type": "ineq", "fun": lambda y: y[order[0]] - heights[order[0]] / 2},
            {"type": "ineq", "fun": lambda y: 100 - heights[order[-1]] / 2 - y[order[-1]]},
        ],
    )  # fmt: skip
    cost = float(((np.array(found) - wanted) ** 2).sum())
    assert cost <= best.fun + 1e-3 * max(1, best.fun)


# Styles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (3.4, 2.448)),
        ({"width": "page"}, (6.75, 3.375)),
        ({"width": 5.5, "height": 2}, (5.5, 2)),
        ({"style": "slides"}, (10, 5.6)),
        ({"style": "slides", "width": 13.33}, (13.33, 13.33 * 0.56)),
    ],
)
def test_a_style_has_the_size_that_is_asked_for(options, size):
    before = matplotlib.rcParams.copy()
    with dy.figure_style(**options):
        figure = plt.figure()
        assert matplotlib.rcParams["pdf.fonttype"] == 42
    assert figure.get_size_inches().tolist() == pytest.approx(list(size))
    assert matplotlib.rcParams == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "papers"}, r"No style 'papers' \(did you mean 'paper'\?\)"),
        ({"width": "colum"}, r"No width 'colum' \(did you mean 'column'\?\)"),
        ({"width": 0}, "width is 0"),
        ({"height": -1}, "height is -1"),
        ({"width": float("nan")}, "width is nan"),
        ({"style": "slides", "width": "column"}, "is a width of paper"),
    ],
)
def test_styles_and_sizes_that_are_none_are_refused(options, message):
    with pytest.raises(DynamicsError, match=message):
        dy.figure_style(**options)


def test_text_stays_text_and_the_same_figure_is_the_same_file(relora, tmp_path):
    from dynamics.plots.figure_files import save_figure

    for suffix in ("svg", "pdf"):
        files = [save_figure(relora, tmp_path / f"{n}.{suffix}")[0] for n in (0, 1)]
        first, second = (each.read_bytes() for each in files)
        assert first == second
    assert b">optimizer step</text>" in (tmp_path / "0.svg").read_bytes()
    assert b'width="244.8pt"' in (tmp_path / "0.svg").read_bytes()  # 3.4 inches
    pdf = (tmp_path / "0.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # TrueType: text can be searched and edited
    assert b"/Type3" not in pdf


# Captions ----------------------------------------------------------------------------------------


def test_captions_of_several_axes_say_once_what_is_common(study):
    axes = dy.plot_panels(dy.plot_heatmap, study.isel(run=[0, 3, 9]), by="run", kind="displacement")
    text = dy.caption(axes)
    assert text.count("Effective rank of the displacement by layer") == 1
    assert "(relora-seed=0) Dotted white: the 6 merges." in text
    assert dy.caption(axes[0].figure.axes) == text


def test_axes_without_a_figure_of_ours_have_no_caption():
    ax = plt.figure().add_subplot()
    with pytest.raises(DynamicsError, match=r"no plot_... function drew on them"):
        dy.caption(ax)


def test_two_figures_on_the_same_axes_have_both_captions(relora):
    ax = dy.plot_trajectory(relora, by="layer")
    dy.plot_trajectory(relora, kind="base", by="layer", ax=ax)
    text = dy.caption(ax)
    assert "Effective rank of the weight" in text
    assert "Effective rank of the base" in text
    assert text.count("Dotted: the 6 merges.") == 1


@pytest.mark.parametrize("title", ["merge", "a title of the user\nin two lines"])
def test_a_title_that_is_set_later_stands_above_the_name_of_the_merge(relora, title):
    for figure_of in (dy.plot_trajectory, dy.plot_heatmap):
        ax = figure_of(relora, kind="displacement")
        ax.set_title(title)  # in the middle, where merges are
        check(ax.figure)
        ax.set_title("")
        assert "merge" in [text.get_text() for text in texts(ax.figure)]
