# The one list of public names. `__init__.py` reads it and imports each name when it is first used.
from .analysis.analyze import analyze
from .analysis.comparison import compare, select_run
from .analysis.examples import load_example
from .analysis.execution import Execution
from .analysis.following import follow
from .analysis.statistics import difference, mean_interval, over
from .analysis.storage import load, save
from .auditing import audit
from .directions.expressibility import gradient_expressibility
from .directions.gradients import gradient_subspaces
from .directions.intruders import intruders
from .directions.subspaces import run_alignment, subspace_overlaps
from .errors import (
    DynamicsError,
    IntervalWarning,
    LeftOutWarning,
    RandomReferenceWarning,
    UnmeasuredWarning,
)
from .exports.frame import to_frame
from .exports.report.report import report
from .formats import open_run
from .metrics import METRICS
from .plots import (
    caption,
    figure_style,
    plot_comparison,
    plot_difference,
    plot_heatmap,
    plot_loss,
    plot_overlaps,
    plot_panels,
    plot_rank_budget,
    plot_spectra_over_time,
    plot_spectrum,
    plot_staircase,
    plot_trajectory,
)
from .runs.run import Run, Spectrum
from .schema import Status
from .spectra.spectrum import singular_values, spectrum

__all__ = [
    "METRICS",
    "DynamicsError",
    "Execution",
    "IntervalWarning",
    "LeftOutWarning",
    "RandomReferenceWarning",
    "Run",
    "Spectrum",
    "Status",
    "UnmeasuredWarning",
    "analyze",
    "audit",
    "caption",
    "compare",
    "difference",
    "figure_style",
    "follow",
    "gradient_expressibility",
    "gradient_subspaces",
    "intruders",
    "load",
    "load_example",
    "mean_interval",
    "open_run",
    "over",
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
    "report",
    "run_alignment",
    "save",
    "select_run",
    "singular_values",
    "spectrum",
    "subspace_overlaps",
    "to_frame",
]
