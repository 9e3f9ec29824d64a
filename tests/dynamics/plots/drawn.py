"""What figures show, read from their axes; names of the matrices of the fixtures."""

import numpy as np

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
