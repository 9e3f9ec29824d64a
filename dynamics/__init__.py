"""Measure how rank evolves while a language model trains.

    import dynamics as dy

    run = dy.open_run("run.zarr")
    analysis = dy.analyze(run)
    both = dy.compare({"full": "full/run.zarr", "relora": "relora/run.zarr"})
    dy.plot_trajectory(analysis, "effective_rank", by="layer")

Names are imported when they are first used, so that `dynamics --help` need not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamics.analysis.analyze import UnmeasuredWarning, analyze
    from dynamics.analysis.comparison import compare, difference, select_run
    from dynamics.analysis.statistics import mean_interval
    from dynamics.analysis.storage import load, save
    from dynamics.auditing import audit
    from dynamics.directions.expressibility import gradient_expressibility
    from dynamics.directions.subspaces import run_alignment, subspace_overlaps
    from dynamics.errors import DynamicsError
    from dynamics.examples import load_example
    from dynamics.formats import open_run
    from dynamics.metrics import METRICS
    from dynamics.plots import plot_comparison, plot_heatmap, plot_spectrum, plot_trajectory
    from dynamics.runs.run import Run, Spectrum
    from dynamics.schema import Status
    from dynamics.spectra.numpy_spectrum import singular_values
    from dynamics.spectra.spectrum import spectrum

_HOMES = {
    "dynamics.analysis.analyze": ("UnmeasuredWarning", "analyze"),
    "dynamics.auditing": ("audit",),
    "dynamics.analysis.comparison": ("compare", "difference", "select_run"),
    "dynamics.errors": ("DynamicsError",),
    "dynamics.examples": ("load_example",),
    "dynamics.directions.expressibility": ("gradient_expressibility",),
    "dynamics.formats": ("open_run",),
    "dynamics.metrics": ("METRICS",),
    "dynamics.plots": ("plot_comparison", "plot_heatmap", "plot_spectrum", "plot_trajectory"),
    "dynamics.runs.run": ("Run", "Spectrum"),
    "dynamics.schema": ("Status",),
    "dynamics.spectra.numpy_spectrum": ("singular_values",),
    "dynamics.spectra.spectrum": ("spectrum",),
    "dynamics.analysis.statistics": ("mean_interval",),
    "dynamics.analysis.storage": ("load", "save"),
    "dynamics.directions.subspaces": ("run_alignment", "subspace_overlaps"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METRICS",
    "DynamicsError",
    "Run",
    "Spectrum",
    "Status",
    "UnmeasuredWarning",
    "analyze",
    "audit",
    "compare",
    "difference",
    "gradient_expressibility",
    "load",
    "load_example",
    "mean_interval",
    "open_run",
    "plot_comparison",
    "plot_heatmap",
    "plot_spectrum",
    "plot_trajectory",
    "run_alignment",
    "save",
    "select_run",
    "singular_values",
    "spectrum",
    "subspace_overlaps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dynamics' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
