"""What figures show, read from their axes; names of the matrices of the fixtures."""

import numpy as np
import pytest
from matplotlib.text import Text

UP_0, UP_1 = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
STEPS = [0, 10, 20]


def labelled_lines(ax):
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


def heatmap_cells(ax):
    mesh = ax.collections[0]
    return np.ma.asarray(mesh.get_array()).reshape(len(ax.get_yticks()), -1)


def points(ax, label):
    """The points of a line that are drawn: without the breaks between cycles."""
    [line] = [line for line in ax.get_lines() if line.get_label() == label]
    xy = np.array([line.get_xdata(), line.get_ydata()], dtype=float)
    return xy[:, np.isfinite(xy[1])]


def band(ax, number):
    """x -> (lowest, highest) of a band."""
    corners = ax.collections[number].get_paths()[0].vertices
    return {
        x: (corners[corners[:, 0] == x][:, 1].min(), corners[corners[:, 0] == x][:, 1].max())
        for x in np.unique(corners[:, 0])
    }


def names_at_ends(ax):
    """The texts beside the axes, in the order in which they were added."""
    return [
        text.get_text().replace("\n", " ")
        for text in ax.texts
        if type(text).__name__ == "_EndLabel"
    ]


def texts(figure):
    """The texts that are drawn, with their boxes in pixels."""
    drawn = []
    draw = Text.draw

    def noting(text, renderer, *arguments):
        if text.get_visible() and text.get_text().strip() and not _is_hidden(text):
            drawn.append(text)
        draw(text, renderer, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Text, "draw", noting)
        figure.canvas.draw()  # the layout is made before anything is drawn
    return {text: text.get_window_extent(figure.canvas.get_renderer()) for text in drawn}


def _is_hidden(text):
    return isinstance(text.get_color(), str) and text.get_color() == "none"
