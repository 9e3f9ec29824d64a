"""The figures of the demo."""

from collections.abc import Callable
from pathlib import Path

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import dynamics as dy

Drawing = Callable[[Axes], object]

_ONE_SCALE = {"rank_by_layer", "displacement_spectrum"}  # panels of two runs share their scale


def draw(comparison: xr.Dataset, folder: Path) -> list[Path]:
    """Draw a comparison of `full_rank` and `relora` as PNGs into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    full_rank, relora = dy.select_run(comparison, "full_rank"), dy.select_run(comparison, "relora")
    layer = int(relora["layer"].max()) // 2
    matrix = f"model.layers.{layer}.mlp.up_proj.weight"
    both = comparison
    figures: dict[str, list[Drawing]] = {
        "rank_by_layer": [
            lambda ax: dy.plot_trajectory(full_rank, by="layer", ax=ax).set_title("full_rank"),
            lambda ax: dy.plot_trajectory(relora, by="layer", ax=ax).set_title("relora"),
        ],
        "rank_by_module": [
            lambda ax, module=module: dy.plot_comparison(both, module=module, ax=ax)  # type: ignore[misc]
            for module in ("q_proj", "v_proj", "up_proj", "down_proj")
        ],
        "update": [
            lambda ax: dy.plot_comparison(both, kind="update", ax=ax),
            lambda ax: dy.plot_comparison(both, "stable_rank", kind="update", ax=ax),
        ],
        "displacement": [
            lambda ax: dy.plot_comparison(both, kind="displacement", ax=ax),
            lambda ax: dy.plot_comparison(both, "numerical_rank", kind="displacement", ax=ax),
        ],
        "displacement_by_layer": [
            lambda ax: dy.plot_heatmap(full_rank, kind="displacement", ax=ax).set_title(
                "full_rank"
            ),
            lambda ax: dy.plot_heatmap(relora, kind="displacement", ax=ax).set_title("relora"),
        ],
        "displacement_spectrum": [
            lambda ax: dy.plot_spectrum(full_rank, matrix, kind="displacement", ax=ax).set_title(
                f"full_rank, {matrix}"
            ),
            lambda ax: dy.plot_spectrum(relora, matrix, kind="displacement", ax=ax).set_title(
                f"relora, {matrix}"
            ),
        ],
        "adapter": [
            lambda ax: dy.plot_trajectory(relora, kind="adapter", ax=ax),
            lambda ax: dy.plot_trajectory(relora, "spectral_norm", kind="adapter", ax=ax),
        ],
        "loss": [lambda ax: _plot_loss(both, ax)],
    }
    return [
        _save(drawings, folder / f"{name}.png", name in _ONE_SCALE)
        for name, drawings in figures.items()
    ]


def _save(drawings: list[Drawing], path: Path, one_scale: bool) -> Path:
    columns = min(len(drawings), 2)
    rows = -(-len(drawings) // columns)
    figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=one_scale)
    for ax, drawing in zip(panels.flat, drawings, strict=True):
        drawing(ax)
    figure.savefig(path, dpi=130)
    return path


def _plot_loss(comparison: xr.Dataset, ax: Axes) -> None:
    for number, run in enumerate(comparison["run"].values.tolist()):
        for name, style in (("loss", "-"), ("eval_loss", "o")):
            if name in comparison:
                line = comparison[name].sel(run=run).dropna("step")
                ax.plot(line["step"], line, style, color=f"C{number}", label=f"{run}, {name}")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("cross-entropy per token (nats)")
    ax.legend(fontsize="small", frameon=False)
    ax.grid(alpha=0.25, linewidth=0.6)
