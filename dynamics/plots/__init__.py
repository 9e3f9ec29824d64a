"""Figures of analyses and comparisons: one file and one function per figure; it returns Axes."""

from dynamics.plots.budget import plot_rank_budget
from dynamics.plots.comparison import plot_comparison
from dynamics.plots.differences import plot_difference
from dynamics.plots.drawing.captions import caption
from dynamics.plots.drawing.style import figure_style
from dynamics.plots.heatmap import plot_heatmap
from dynamics.plots.loss import plot_loss
from dynamics.plots.overlaps import plot_overlaps
from dynamics.plots.panels import plot_panels
from dynamics.plots.spectra_over_time import plot_spectra_over_time
from dynamics.plots.spectrum import plot_spectrum
from dynamics.plots.staircase import plot_staircase
from dynamics.plots.trajectory import plot_trajectory

__all__ = [
    "caption",
    "figure_style",
    "plot_comparison",
    "plot_difference",
    "plot_heatmap",
    "plot_loss",
    "plot_overlaps",
    "plot_panels",
    "plot_rank_budget",
    "plot_spectra_over_time",
    "plot_spectrum",
    "plot_staircase",
    "plot_trajectory",
]
