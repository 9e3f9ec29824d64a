"""Figures of analyses and comparisons: one file and one function per figure; it returns Axes."""

from dynamics.plots.comparison import plot_comparison
from dynamics.plots.heatmap import plot_heatmap
from dynamics.plots.spectrum import plot_spectrum
from dynamics.plots.trajectory import plot_trajectory

__all__ = ["plot_comparison", "plot_heatmap", "plot_spectrum", "plot_trajectory"]
