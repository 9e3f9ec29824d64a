"""The figures of the demo."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr

import dynamics as dy

MODULES = ("q_proj", "v_proj", "up_proj", "down_proj")


def draw(comparison: xr.Dataset, folder: Path) -> list[Path]:
    """Draw a comparison of `full_rank` and `relora` as PNGs into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    relora = dy.select_run(comparison, "relora")
    layer = int(relora["layer"].max()) // 2
    matrix = f"model.layers.{layer}.mlp.up_proj.weight"
    of_modules = comparison.sel(matrix=comparison["module"].isin(MODULES))
    by_run: Callable[..., Any] = partial(dy.plot_panels, dataset=comparison, by="run")
    moved = {"kind": "displacement"}
    figures: dict[str, Callable[[], Any]] = {
        "rank_by_layer": lambda: by_run(partial(dy.plot_trajectory, by="layer")),
        "rank_by_module": lambda: dy.plot_panels(
            dy.plot_comparison, of_modules, by="module", columns=2
        ),
        "update": lambda: _two(
            comparison, [("effective_rank", "update"), ("stable_rank", "update")]
        ),
        "displacement": lambda: dy.plot_staircase(comparison),
        "displacement_by_layer": lambda: by_run(dy.plot_heatmap, **moved),
        "displacement_spectrum": lambda: by_run(partial(dy.plot_spectrum, matrix=matrix), **moved),
        "spectra_over_time": lambda: by_run(
            partial(dy.plot_spectra_over_time, matrix=matrix), **moved
        ),
        "adapter": lambda: dy.plot_trajectory(relora, kind="adapter"),
        "loss": lambda: dy.plot_loss(comparison),
    }
    return [_save(drawing, folder / f"{name}.png") for name, drawing in figures.items()]


def _two(comparison: xr.Dataset, shown: list[tuple[str, str]]) -> None:
    """Metrics beside each other."""
    _, axes = plt.subplots(1, len(shown))
    for ax, (metric, kind) in zip(axes, shown, strict=True):
        dy.plot_comparison(comparison, metric, kind=kind, ax=ax)


def _save(drawing: Callable[[], Any], path: Path) -> Path:
    with dy.figure_style("paper", width="page"):
        drawing()
        figure = plt.gcf()
        figure.savefig(path, dpi=200)
        plt.close(figure)
    return path
