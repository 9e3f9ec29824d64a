"""Figures and tables of docs/results.md, from the example `low_rank_micro`.

    python docs/results.py

writes docs/results/*.png, and the tables in docs/results.md between its markers.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import dynamics as dy
from dynamics.metrics.spectral import effective_rank
from dynamics.plots.drawing.lines import Line, draw_lines
from dynamics.plots.drawing.style import line_style
from probes.relora import micro
from probes.relora.sweep import over_seeds

sys.path.insert(0, str(Path(__file__).parent))
from page_parts import finish, interval, line_of, save_figure, table, with_tables

DOCS = Path(__file__).parent
PAGE = DOCS / "results.md"
FIGURES = DOCS / "results"
FIGURE_NAMES = ("losses", "displacement", "updates", "spectra", "gradients", "twins")
FIRST, LAST = 20, 560
RANK, GAP = 8, 80
LABELS = {
    "full_rank": "full rank",
    "muon": "Muon",
    "fira": "Fira",
    "apollo": "APOLLO",
    "relora": "ReLoRA",
    "galore": "GaLore",
    "lora": "LoRA",
    "sltrain": "SLTrain",
    "cola": "CoLA",
}
# Methods whose construction bounds the displacement, and the others.
FREE = ("full_rank", "muon", "fira", "apollo")
BOUND = ("relora", "galore", "lora")
DENSE = (*FREE, *BOUND, "sltrain")  # CoLA has no dense weight
MLP = ("gate_proj", "up_proj", "down_proj")
# The sides of most matrices: of these, spectra have equally many values.
SHORT_SIDE = 128


def style(method: str) -> dict[str, object]:
    """The colour and dashes that a method has in every figure."""
    return line_style(list(LABELS).index(method))


def of_kind(data: xr.Dataset, kind: str) -> xr.Dataset:
    """The matrices of a kind."""
    return data.sel(kind=kind, drop=True)


def lines(data: xr.Dataset, metric: str, methods: Sequence[str], ax: Axes) -> None:
    """A mean over seeds and matrices for each method, with its interval."""
    found = over_seeds(data, metric)
    draw_lines(ax, [line_of(found.sel(run=each), LABELS[each], style(each)) for each in methods])


def draw_losses(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """The validation loss, and how far it is from that of full rank with the same seed."""
    lines(data, "eval_loss", list(LABELS), axes[0])
    finish(axes[0], "optimizer step", "validation loss (nats)")
    losses = data["eval_loss"]
    twins = losses.sel(run=[f"full_rank-seed={seed}" for seed in data["seed"].values])
    others = [each for each in LABELS if each not in ("full_rank", "cola")]
    lines(data.assign(eval_loss=losses - twins.values), "eval_loss", others, axes[1])
    finish(axes[1], "optimizer step", "minus full rank's (nats)")
    axes[1].axhline(0, color="0.5", linewidth=0.8, linestyle=":")


def draw_displacement(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """Numerical rank of the displacement with its bound, and its effective rank."""
    chosen = of_kind(data, "displacement")
    lines(chosen, "numerical_rank", ("full_rank", *BOUND), axes[0])
    for method in BOUND[1:]:
        bound = over_seeds(chosen, "rank_bound").sel(run=method)
        bound = bound.isel(step=np.flatnonzero(bound["mean"].notnull().values))
        axes[0].step(bound["step"], bound["mean"], where="pre", color="0.8", linewidth=4, zorder=0)
    axes[0].set_title("numerical rank, and the bound")
    lines(chosen, "effective_rank", DENSE, axes[1])
    axes[1].set_title("effective rank")
    for ax in axes:
        finish(ax, "optimizer step", "rank of the displacement" if ax is axes[0] else "")
        ax.set_ylim(bottom=0)


def draw_updates(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """Effective and stable rank of what 20 steps change."""
    chosen = of_kind(data, "update")
    for ax, metric in zip(axes, ("effective_rank", "stable_rank"), strict=True):
        lines(chosen, metric, DENSE, ax)
        finish(ax, "optimizer step", metric.replace("_", " "))
        ax.set_title("update over 20 steps")
        ax.set_yscale("log")
        ax.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
        ax.minorticks_off()


def draw_spectra(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """Singular values of updates over the largest one, at three steps."""
    chosen = of_kind(data, "update")
    for ax, step in zip(axes, (80, 320, LAST), strict=True):
        found = {method: spectrum(chosen, method, step) for method in DENSE}
        drawn = [
            Line(LABELS[name], np.arange(1, each.size + 1), each, {**style(name), "marker": None})
            for name, each in found.items()
        ]
        draw_lines(ax, drawn)
        ax.axvline(RANK, color="0.5", linewidth=0.8, linestyle=":")
        finish(ax, "index i", "σᵢ/σ₁" if ax is axes[0] else "")
        ax.set_yscale("log")
        ax.set_ylim(5e-3, 1.1)
        ax.set_xscale("log", base=2)
        ax.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "", "128"])
        ax.set_title(f"update, step {step}")


def spectrum(chosen: xr.Dataset, method: str, step: int) -> np.ndarray:
    """Mean over matrices and seeds of σ_i/σ_1, where the mean of floors is below σ_i."""
    runs = [each for each in chosen["run"].values.tolist() if each.startswith(f"{method}-seed")]
    square = (np.minimum(chosen["rows"], chosen["cols"]) == SHORT_SIDE) & (chosen["layer"] >= 0)
    cells = chosen.sel(run=runs, step=step).isel(matrix=np.flatnonzero(square.values))
    s = cells["singular_value"].isel(index=slice(SHORT_SIDE))
    above = s.where(s > cells["noise_floor"])
    relative = (above / s.isel(index=0)).mean(("run", "matrix"))
    return relative.values[np.isfinite(relative.values)]


def draw_gradients(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """How much of a gradient few directions hold: its own, those of before, the projector's."""
    chosen = of_kind(data, "gradient")
    lines(chosen, "gradient_energy", DENSE, axes[0])
    axes[0].set_title("in its own 8 leading directions")
    lines(chosen, "gradient_energy_in_last", DENSE, axes[1])
    axes[1].set_title("in those of 20 steps before")
    found = {
        "its own 8": "gradient_energy",
        "20 steps before": "gradient_energy_in_last",
        "the projector": "gradient_energy_in_projector",
    }
    drawn = [
        line_of(over_seeds(chosen, name).sel(run="galore"), label, line_style(number))
        for number, (label, name) in enumerate(found.items())
    ]
    draw_lines(axes[2], drawn)
    axes[2].set_title("GaLore")
    for ax in axes:
        finish(ax, "optimizer step", "share of the gradient" if ax is axes[0] else "")
        ax.set_ylim(0, 1)


def draw_twins(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """How far each displacement points where that of the full-rank twin does."""
    chosen = of_kind(data, "displacement")
    twins = [each for each in DENSE if each not in ("full_rank", "sltrain")]
    lines(chosen, "twin_alignment", twins, axes[0])
    finish(axes[0], "optimizer step", "cosine")
    axes[0].set_title("displacement, with the full-rank twin's")
    lines(chosen, "twin_left_overlap", twins, axes[1])
    finish(axes[1], "optimizer step", "mean cos²")
    axes[1].set_title("their 8 leading left directions")
    for ax in axes:
        ax.set_ylim(bottom=0)


def cells_of(
    data: xr.Dataset, methods: Sequence[str], columns: dict[str, tuple[str, int]]
) -> list[list[str]]:
    """A row for each method: column -> (variable, digits)."""
    found = {name: over_seeds(data, name) for name, _ in columns.values()}
    return [
        [
            LABELS[method],
            *(interval(found[name].sel(run=method), digits) for name, digits in columns.values()),
        ]
        for method in methods
    ]


def final_table(data: xr.Dataset) -> str:
    """Rates, parameters and losses."""
    columns = {"training loss": ("loss", 3), "validation loss": ("eval_loss", 3)}
    rows = cells_of(data.sel(step=LAST), list(LABELS), columns)
    for row, method in zip(rows, LABELS, strict=True):
        run = data.sel(run=f"{method}-seed=0")
        row[1:1] = [f"{int(run['trainable_parameters']):,}", f"{micro(method).learning_rate:g}"]
    return table(["", "parameters that train", "rate", *columns], rows)


def by_chance(chosen: xr.Dataset, method: str) -> float:
    """Mean effective rank of random matrices with the shapes and rank bounds of a kind."""
    cells = chosen.sel(run=f"{method}-seed=0").isel(matrix=np.flatnonzero(chosen["layer"] >= 0))
    cells = cells.where(cells["rank_bound"].notnull(), drop=True)
    rng = np.random.default_rng(0)
    found = []
    for rows, cols, rank in zip(
        *(cells[name].values.astype(int) for name in ("rows", "cols", "rank_bound")), strict=True
    ):
        product = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))
        if rank >= min(rows, cols):
            product = rng.standard_normal((rows, cols))
        found.append(effective_rank(np.linalg.svd(product, compute_uv=False)[:rank]))
    return float(np.mean(found))


def displacement_table(data: xr.Dataset) -> str:
    """What the displacement is at the end, beside its bound, and random directions within it."""
    chosen = of_kind(data, "displacement").sel(step=LAST)
    columns = {
        "bound": ("rank_bound", 1),
        "numerical rank": ("numerical_rank", 1),
        "effective rank": ("effective_rank", 1),
        "stable rank": ("stable_rank", 1),
        "norm": ("frobenius_norm", 2),
        "cosine with full rank's": ("twin_alignment", 2),
    }
    rows = cells_of(chosen, DENSE, columns)
    for row, method in zip(rows, DENSE, strict=True):
        row.insert(4, f"{by_chance(chosen, method):.1f}")
    header = list(columns)
    header.insert(3, "by chance")
    return table(["", *header], rows)


def updates_table(data: xr.Dataset) -> str:
    """What 20 steps change, in our words and in those of the study, which two records have."""
    chosen = of_kind(data, "update").sel(step=[320, LAST]).mean("step")
    columns = {
        "bound": ("rank_bound", 1),
        "numerical rank": ("numerical_rank", 1),
        "effective rank": ("effective_rank", 1),
        "stable rank": ("stable_rank", 1),
        "study_rank": ("study_rank", 1),
        "study_effective_rank": ("study_effective_rank", 1),
    }
    return table(["", *columns], cells_of(chosen, DENSE, columns))


def weights_table(data: xr.Dataset) -> str:
    """Effective rank and condition number of weights, at the start and at the end."""
    chosen = of_kind(data, "weight")
    # The smallest singular value of a square matrix may be anything; those of the MLP are none.
    mlp = chosen.isel(matrix=np.flatnonzero(chosen["module"].isin(MLP).values))
    rows = []
    for method in LABELS:
        cells = []
        for of, metric in ((chosen, "effective_rank"), (mlp, "condition_number")):
            found = over_seeds(of, metric).sel(run=method)
            cells += [interval(found.sel(step=step), 1) for step in (0, LAST)]
        found = over_seeds(chosen.sel(step=LAST), "intruder_intruders").sel(run=method)
        noise = over_seeds(chosen.sel(step=LAST), "intruder_intruders_of_noise").sel(run=method)
        rows.append([LABELS[method], *cells, interval(found, 2), interval(noise, 2)])
    header = ["effective rank, step 0", f"step {LAST}"]
    header += ["condition number (mlp), step 0", f"step {LAST}"]
    return table(["", *header, "intruders since 280", "of noise"], rows)


def gradients_table(data: xr.Dataset) -> str:
    """How much of a gradient few directions hold, over the last gap."""
    chosen = of_kind(data, "gradient").sel(step=slice(LAST - GAP + FIRST, LAST)).mean("step")
    columns = {
        "effective rank": ("effective_rank", 1),
        "in its own 8": ("gradient_energy", 2),
        "in the 8 of 20 steps before": ("gradient_energy_in_last", 2),
        "in the projector": ("gradient_energy_in_projector", 2),
        "chance": ("gradient_chance", 2),
    }
    return table(["", *columns], cells_of(chosen, DENSE, columns))


def audit_table(data: xr.Dataset) -> str:
    """Which checks fail or warn in how many of a method's runs."""
    audits = json.loads(data.attrs["audits"])
    rows = []
    for method, label in LABELS.items():
        reports = [each for name, each in audits.items() if name.startswith(f"{method}-seed=")]
        severities = [severity for each in reports for severity, _ in each.values()]
        rows.append([label, *(str(severities.count(word)) for word in ("pass", "warn", "fail"))])
    return table(["three runs of", "checks that pass", "warn", "fail"], rows)


def tables(data: xr.Dataset) -> dict[str, str]:
    """Name -> table."""
    return {
        "final": final_table(data),
        "displacement": displacement_table(data),
        "updates": updates_table(data),
        "weights": weights_table(data),
        "gradients": gradients_table(data),
        "audit": audit_table(data),
    }


def main() -> None:
    """Write the figures and the tables."""
    data = dy.load_example("low_rank_micro")
    for name, columns, draw in (
        ("losses", 2, draw_losses),
        ("displacement", 2, draw_displacement),
        ("updates", 2, draw_updates),
        ("spectra", 3, draw_spectra),
        ("gradients", 3, draw_gradients),
        ("twins", 2, draw_twins),
    ):
        path = FIGURES / f"{name}.png"
        save_figure(path, 1, columns, lambda axes, draw=draw: draw(data, axes[0]))
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), tables(data)), "utf-8")


if __name__ == "__main__":
    main()
