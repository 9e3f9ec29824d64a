"""Figures and tables of docs/relora_results.md, from the example `relora_micro`.

    python docs/relora_results.py [CURVES.csv]

writes docs/relora_results/*.png, and the tables in docs/relora_results.md between its markers.
CURVES.csv has the published values (columns metric, kind, component, scale, model, step, value);
without it, the figures that show them are left as they are.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import dynamics as dy
from dynamics.plots.drawing.lines import Line, draw_lines
from dynamics.plots.drawing.style import PALETTE, line_style
from probes.relora.sweep import over_seeds

sys.path.insert(0, str(Path(__file__).parent))
from page_parts import finish, interval, line_of, save_figure, table, with_tables

DOCS = Path(__file__).parent
PAGE = DOCS / "relora_results.md"
FIGURES = DOCS / "relora_results"
FIGURE_NAMES = ("losses", "restart", "displacement", "weights", "updates")
RESET_EVERY, LAST = 80, 560
PAPER_STEPS = 20_000
# run of `over_seeds` -> label and colour
RUNS = {
    "full_rank": ("full rank", PALETTE[0]),
    "relora": ("ReLoRA", PALETTE[1]),
    "relora-as_published": ("ReLoRA as published", PALETTE[2]),
    "lora": ("LoRA without resets", PALETTE[3]),
}
RESTARTS = (
    ("nothing", "merge", "reset", "ramp"),
    ("reset + ramp", "merge + reset + ramp", "unscaled merge + reset + ramp"),
)
# the paper's component -> ours
COMPONENTS = {
    "swiglu.w_2": "down_proj",
    "ov_circuit": "pico_ov_circuit",
    "attention.v_proj": "v_proj",
    "attention.o_proj": "o_proj",
}
# (kind, metric, component, scale, model) -> [(step, value)]
Curves = dict[tuple[str, str, str, str, str], list[tuple[float, float]]]


def published(path: Path) -> Curves:
    """The paper's curves, by kind, metric, component, scale and model."""
    curves: Curves = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("kind", "metric", "component", "scale", "model"))
            curves.setdefault(key, []).append((float(row["step"]), float(row["value"])))
    return curves


def of_module(data: xr.Dataset, module: str) -> xr.Dataset:
    """The matrices of a module, or the circuits of a component."""
    chosen = (data["module"] == module) & (data["component"] == "parameters")
    chosen |= data["component"] == module
    return data.isel(matrix=np.flatnonzero(chosen.values))


def parameters(data: xr.Dataset) -> xr.Dataset:
    """The matrices that are parameters, without circuits."""
    return data.isel(matrix=np.flatnonzero((data["component"] == "parameters").values))


def with_labels(data: xr.Dataset) -> xr.Dataset:
    """The runs under the names that the page has for them."""

    def label(run: str) -> str:
        method, seed, number = run.rpartition("-seed=")
        return f"{RUNS[method][0]}{seed}{number}"

    events = {label(run): each for run, each in json.loads(data.attrs["events"]).items()}
    runs = [label(run) for run in data["run"].values.tolist()]
    return data.assign_coords(run=runs).assign_attrs(events=json.dumps(events))


def mark_merges(ax: Axes) -> None:
    """A dotted line at each merge."""
    for step in range(RESET_EVERY, LAST, RESET_EVERY):
        ax.axvline(step, color="0.6", linewidth=0.8, linestyle=":", zorder=0)


def draw_losses(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """Training loss, and validation loss."""
    for ax, name, title in zip(
        axes,
        ("loss", "eval_loss"),
        ("training loss, mean over 20 steps", "validation loss"),
        strict=True,
    ):
        dy.plot_loss(with_labels(data), metric=None, loss=name, over="seed", ax=ax)
        ax.set_ylabel("nats per token")
        ax.set_title(title)


def draw_restart(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """The validation loss around a restart, less the one before it."""
    found = restart_changes(data)
    for ax, names in zip(axes, RESTARTS, strict=True):
        if names is RESTARTS[1]:
            names = ("nothing", *names)
        draw_lines(
            ax,
            [
                line_of(found.sel(restart=name), name, line_style(number), "after")
                for number, name in enumerate(names)
            ],
        )
        ax.axhline(0, color="0.5", linewidth=0.8)
        finish(ax, "optimizer steps after the restart", "change of the\nvalidation loss (nats)")


def restart_changes(data: xr.Dataset) -> xr.Dataset:
    """Mean over seeds of the validation loss less that before the restart, (restart, after)."""
    losses = data["restart_loss"]
    return dy.mean_interval(losses - losses.sel(after=-1), "run")


def draw_displacement(data: xr.Dataset, axes: Sequence[Axes]) -> None:
    """Numerical rank of the displacement below its bound, and its effective rank."""
    chosen = with_labels(parameters(data))
    dy.plot_staircase(chosen, over="seed", effective=False, ax=axes[0])
    axes[0].set_title("numerical rank, and the bound")
    dy.plot_comparison(chosen, kind="displacement", over="seed", ax=axes[1])
    axes[1].set_title("effective rank")
    axes[1].set_ylim(bottom=0)
    axes[1].set_ylabel("")


def draw_weights(data: xr.Dataset, curves: Curves, axes: np.ndarray) -> None:
    """PER and condition number of weights: published on the left, ours on the right."""
    rows = [
        (metric, component)
        for component in ("swiglu.w_2", "ov_circuit")
        for metric in ("per", "condition_number")
    ]
    ours = [
        ("full_rank", "weight", "-", "full rank"),
        ("relora", "base", "-", "ReLoRA, base"),
        ("relora", "weight", "--", "ReLoRA, effective"),
        ("relora-as_published", "base", "-", "as published, base"),
        ("lora", "weight", "--", "LoRA, effective"),
    ]
    for (left, right), (metric, component) in zip(axes, rows, strict=True):
        draw_published(left, curves, "weights", metric, component)
        chosen = of_module(data, COMPONENTS[component])
        draw_ours(right, chosen, OURS[metric], ours)
        mark_merges(right)
        for ax, where in ((left, "published"), (right, "micro")):
            finish(ax, "optimizer step", NAMES[metric])
            ax.set_title(f"{TITLES[component]}, {where}")


def draw_ours(
    ax: Axes, chosen: xr.Dataset, metric: str, ours: Sequence[tuple[str, str, str, str]]
) -> None:
    """Our lines: (run, kind, dashes, label)."""
    draw_lines(
        ax,
        [
            line_of(
                over_seeds(chosen.sel(kind=kind), metric).sel(run=run),
                label,
                {"color": RUNS[run][1], "linestyle": dashes},
            )
            for run, kind, dashes, label in ours
        ],
    )


OURS = {"per": "proportional_effective_rank", "condition_number": "condition_number"}
NAMES = {"per": "PER", "condition_number": "condition number"}
TITLES = {
    "swiglu.w_2": "down projection (w_2)",
    "ov_circuit": "OV circuit as pico-analyze has it",
    "attention.v_proj": "v_proj",
    "attention.o_proj": "o_proj",
}


def draw_published(ax: Axes, curves: Curves, kind: str, metric: str, component: str) -> None:
    """The paper's lines, small solid and tiny dashed. Its ReLoRA is what ours is as published."""
    lines = []
    for model, run in (("full_rank", "full_rank"), ("relora", "relora-as_published")):
        for scale, dashes in (("small", "-"), ("tiny", "--")):
            points = sorted(curves[kind, metric, component, scale, model])
            name = f"{'full rank' if model == run else 'ReLoRA'} {scale}"
            style = {"color": RUNS[run][1], "linestyle": dashes}
            lines.append(Line(name, *np.array(points).T, style))
    draw_lines(ax, lines)


def draw_updates(data: xr.Dataset, curves: Curves, axes: np.ndarray) -> None:
    """PER of gradients and adapters: published on the left, ours on the right."""
    ours = [
        ("full_rank", "gradient", "-", "full rank, gradient"),
        ("relora", "adapter", "-", "ReLoRA, adapter"),
        ("relora-as_published", "adapter", "-", "as published, adapter"),
        ("relora", "gradient", "--", "ReLoRA, gradient of the frozen weight"),
    ]
    for (left, right), component in zip(
        axes, ("attention.v_proj", "attention.o_proj", "swiglu.w_2"), strict=True
    ):
        draw_published(left, curves, "updates", "per", component)
        chosen = of_module(data, COMPONENTS[component])
        draw_ours(right, chosen, OURS["per"], ours)
        bound = float(chosen["rank_bound"].sel(kind="adapter").max())
        smallest = int(np.minimum(chosen["rows"], chosen["cols"]).max())
        right.axhline(bound / smallest, color="0.3", linewidth=1, linestyle=":")
        for scale, style in (("small", ":"), ("tiny", ":")):
            k = PAPER_MIN_DIMENSION[component, scale]
            left.axhline(16 / k, color="0.3", linewidth=1, linestyle=style)
        mark_merges(right)
        for ax, where in ((left, "published"), (right, "micro")):
            finish(ax, "optimizer step", "PER")
            ax.set_title(f"{TITLES[component]}, {where}")


PAPER_MIN_DIMENSION = {
    ("attention.v_proj", "tiny"): 32,
    ("attention.o_proj", "tiny"): 96,
    ("swiglu.w_2", "tiny"): 96,
    ("attention.v_proj", "small"): 128,
    ("attention.o_proj", "small"): 384,
    ("swiglu.w_2", "small"): 384,
}


def final_table(data: xr.Dataset) -> str:
    """Losses, perplexities and BLiMP at the last step."""
    columns = {
        "training loss": ("loss", 3),
        "validation loss": ("eval_loss", 3),
        "perplexity": ("perplexity", 1),
        "mean text perplexity": ("mean_text_perplexity", 1),
        "BLiMP": ("blimp", 3),
        "BLiMP ties": ("blimp_ties", 1),
    }
    last = data.sel(step=LAST)
    found = {name: over_seeds(last, variable) for name, (variable, _) in columns.items()}
    trainable = found["training loss"]["trainable_parameters"]
    return table(
        ["", "seeds", "trainable", *columns],
        [
            [
                label,
                str(int(found["training loss"]["count"].sel(run=run))),
                f"{int(trainable.sel(run=run)):,}",
                *(interval(found[name].sel(run=run), columns[name][1]) for name in columns),
            ]
            for run, (label, _) in RUNS.items()
        ],
    )


def displacement_table(data: xr.Dataset) -> str:
    """Ranks of the displacement at the last step."""
    chosen = parameters(data).sel(step=LAST)
    columns = ("numerical_rank", "effective_rank", "stable_rank", "frobenius_norm")
    displacement = chosen.sel(kind="displacement")
    found = {name: over_seeds(displacement, name) for name in columns}
    weights = over_seeds(chosen.sel(kind="weight"), "effective_rank")
    return table(
        ["", *(name.replace("_", " ") for name in columns), "effective rank of the weight"],
        [
            [
                label,
                *(interval(found[name].sel(run=run), 1) for name in columns),
                interval(weights.sel(run=run), 1),
            ]
            for run, (label, _) in RUNS.items()
        ],
    )


def restart_table(data: xr.Dataset) -> str:
    """The change of the validation loss around a restart, in thousandths of a nat."""
    found = restart_changes(data) * 1000
    moments = (0, 1, 2, 5, 10, 20)
    return table(
        ["", "right after", *(f"{after} steps" for after in moments[1:])],
        [
            [name, *(interval(found.sel(restart=name, after=after), 1) for after in moments)]
            for name in data["restart"].values.tolist()
        ],
    )


def weights_table(data: xr.Dataset, curves: Curves) -> str:
    """PER and condition number of weights, from the first step to the last."""
    rows = []
    for component in ("swiglu.w_2", "ov_circuit"):
        chosen = of_module(data, COMPONENTS[component])
        for metric, digits in (("per", 3), ("condition_number", 2)):
            cells = [
                _span(dict(curves["weights", metric, component, scale, model]), digits)
                for scale in ("tiny", "small")
                for model in ("full_rank", "relora")
            ]
            for run, kind in (
                ("full_rank", "weight"),
                ("relora", "base"),
                ("relora", "weight"),
                ("relora-as_published", "base"),
            ):
                found = over_seeds(chosen.sel(kind=kind), OURS[metric]).sel(run=run)
                first, last = (found.sel(step=step) for step in (0, LAST))
                cells.append(f"{float(first['mean']):.{digits}f} → {interval(last, digits)}")
            rows.append([f"{TITLES[component].split(' as ')[0]}, {NAMES[metric]}", *cells])
    return table(
        [
            "",
            "full rank tiny",
            "ReLoRA tiny",
            "full rank small",
            "ReLoRA small",
            "micro: full rank",
            "ReLoRA, base",
            "ReLoRA, effective",
            "as published, base",
        ],
        rows,
    )


def _span(curve: dict[float, float], digits: int) -> str:
    return f"{curve[0.0]:.{digits}f} → {curve[float(PAPER_STEPS)]:.{digits}f}"


def audit_table(data: xr.Dataset) -> str:
    """Which checks fail in how many of a method's runs."""
    audits = json.loads(data.attrs["audits"])
    rows = []
    for run, (label, _) in RUNS.items():
        reports = [each for name, each in audits.items() if name.rpartition("-seed=")[0] == run]
        counts: dict[str, int] = {}
        for report in reports:
            for check, (severity, _) in report.items():
                if severity in ("fail", "warn"):
                    counts[f"`{check}` ({severity})"] = counts.get(f"`{check}` ({severity})", 0) + 1
        rows.append(
            [
                label,
                ", ".join(f"{name}: {n} of {len(reports)}" for name, n in counts.items()) or "none",
            ]
        )
    return table(["", "checks that fail or warn"], rows)


def tables(data: xr.Dataset, curves: Curves | None) -> dict[str, str]:
    """Name -> table; those that show published values only with the curves."""
    found = {
        "final": final_table(data),
        "restart": restart_table(data),
        "displacement": displacement_table(data),
        "audit": audit_table(data),
    }
    return found if curves is None else {**found, "weights": weights_table(data, curves)}


def main(curves_path: Path | None) -> None:
    """Write the figures and the tables."""
    data = dy.load_example("relora_micro")
    curves = None if curves_path is None else published(curves_path)
    save_figure(FIGURES / "losses.png", 1, 2, lambda axes: draw_losses(data, axes[0]))
    save_figure(FIGURES / "restart.png", 1, 2, lambda axes: draw_restart(data, axes[0]))
    save_figure(FIGURES / "displacement.png", 1, 2, lambda axes: draw_displacement(data, axes[0]))
    if curves is not None:
        save_figure(FIGURES / "weights.png", 4, 2, lambda axes: draw_weights(data, curves, axes))
        save_figure(FIGURES / "updates.png", 3, 2, lambda axes: draw_updates(data, curves, axes))
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), tables(data, curves)), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
