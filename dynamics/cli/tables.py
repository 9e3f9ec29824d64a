"""Tables and lines for a terminal: results, contents of runs, audits."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from dynamics import schema
from dynamics.analysis.statistics import STATISTIC
from dynamics.auditing.report import Report, Severity, Summary
from dynamics.metrics.modules import metric_names
from dynamics.recordings.verification import Verification
from dynamics.runs.fused import kept_whole
from dynamics.runs.run import Run, abridged
from dynamics.schema import Status

# What the tables show of an analysis, as far as it has them.
_COLUMNS = {
    "effective_rank": "effective\nrank",
    "proportional_effective_rank": "PER",
    "numerical_rank": "numerical\nrank",
}

_MEASURED = "is_measured"

_COLORS = {
    Severity.FAIL: "bold red",
    Severity.WARN: "yellow",
    Severity.PASS: "green",
    Severity.NOT_CHECKED: "dim",
}


class Table(RichTable):
    """A table that shows texts as they are: names and paths may hold what Rich takes for markup.

    What is longer than its column goes on in the next line; nothing is cut.
    """

    def add_column(self, header: Any = "", *rest: Any, **options: Any) -> None:
        """A column, see `rich.table.Table`."""
        options.setdefault("overflow", "fold")
        super().add_column(_as_it_is(header), *rest, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """A row, see `rich.table.Table`."""
        super().add_row(*map(_as_it_is, cells), **options)


def _pairs() -> Table:
    """A table without header: what, and how it is."""
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _as_it_is(text: Any) -> Any:
    return Text(text) if isinstance(text, str) else text


def summary_table(dataset: xr.Dataset) -> Table:
    """First → last measured value of each kind, averaged over matrices, as a table for a terminal.

    One run has a row for each kind and module. A comparison has one for each kind and run, averaged
    over the matrices inside the stack of layers. A "-" stands where nothing was measured. The title
    names the steps, and the caption those of the kinds and runs that have others.
    """
    if STATISTIC in dataset.dims:
        dataset = dataset.sel({STATISTIC: "mean"}, drop=True)
    dataset = dataset.assign({_MEASURED: _is_measured(dataset)})
    several = schema.RUN in dataset.dims
    metrics = [name for name in _COLUMNS if name in dataset] or metric_names(dataset)[:2]
    over = "the matrices of the layers" if several else "layers"
    if "baseline" in dataset.attrs:
        over += f", less {_subtracted(dataset.attrs)}"
    first_to_last, others = _measured_steps(dataset)
    table = Table(
        title=Text(f"First → last measured step: {first_to_last}, mean over {over}"),
        caption=others and Text(others),
        box=box.SIMPLE_HEAD,
    )
    table.add_column("kind")
    table.add_column("run" if several else "module")
    for metric in metrics:
        table.add_column(_COLUMNS.get(metric, metric), justify="right")
    for kind in dataset[schema.KIND].values.tolist():
        for name, rows in _groups(dataset.sel({schema.KIND: kind}), several):
            if rows[_MEASURED].any():
                table.add_row(kind, name, *(_first_to_last(rows[metric]) for metric in metrics))
        table.add_section()
    return table


def _subtracted(attrs: Mapping[Any, Any]) -> str:
    """The run or the setting that differences are taken from."""
    pairs = f" (pairs of one {attrs['pair']})" if "pair" in attrs else ""
    return f"{attrs['baseline']}{pairs}"


def result_table(dataset: xr.Dataset, path: object) -> Table:
    """What a saved result is, what is in it, and what made it."""
    attrs = dataset.attrs
    table = _pairs()
    several = schema.RUN in dataset.dims
    what = f"differences from {_subtracted(attrs)}" if "baseline" in attrs else "comparison"
    table.add_row("path", str(path))
    table.add_row("result", what if several else "analysis")
    if several:
        table.add_row("runs", ", ".join(dataset[schema.RUN].values.tolist()))
        for name, coord in dataset.coords.items():
            if coord.dims == (schema.RUN,) and name != schema.RUN:
                table.add_row(str(name), abridged(list(dict.fromkeys(coord.values.tolist()))))
    if "source" in attrs:
        table.add_row("source", str(attrs["source"]))
    table.add_row("kinds", ", ".join(dataset[schema.KIND].values.tolist()))
    table.add_row("steps", abridged(dataset[schema.STEP].values.tolist()))
    modules = list(dict.fromkeys(dataset["module"].values.ravel().tolist()))
    table.add_row("matrices", f"{dataset.sizes[schema.MATRIX]}: {abridged(modules)}")
    table.add_row("metrics", ", ".join(metric_names(dataset)))
    if schema.STATUS in dataset:
        numbers, counts = np.unique(dataset[schema.STATUS].values, return_counts=True)
        cells = [
            f"{count} {Status(number).name.lower().replace('_', ' ')}"
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        table.add_row("cells", ", ".join(cells))
    if schema.NOISE_FLOOR in dataset:
        mixed = "of different definitions in different runs: analyse the older ones again"
        table.add_row("noise floor", dataset[schema.NOISE_FLOOR].attrs.get("long_name", mixed))
    versions = json.loads(attrs.get("versions", "{}"))
    table.add_row("versions", ", ".join(f"{name} {each}" for name, each in versions.items()))
    table.add_row("command", str(attrs.get(schema.COMMAND, "none; it was made in Python")))
    return table


def diagnosis_table(diagnosis: Mapping[str, list[tuple[str, str]]]) -> Table:
    """What `dynamics doctor` found."""
    table = _pairs()
    for heading, rows in diagnosis.items():
        table.add_row(Text(heading, style="bold"), "")
        for what, found in rows:
            table.add_row(f"  {what}", found)
    return table


def contents_table(run: Run) -> Table:
    """What a run holds."""
    table = _pairs()
    table.add_row("path", run.path)
    table.add_row("format", run.format)
    table.add_row("steps", abridged(run.steps.tolist()))
    if run.places:
        table.add_row("read from", abridged(_relative_places(run), at_most=5))
    table.add_row("kinds", ", ".join(run.kinds))
    table.add_row("scalars", ", ".join(run.scalars) or "none")
    events = [f"{event.kind} at {event.step}" for event in run.events]
    table.add_row("events", abridged(events) or "none")
    if run.account is not None:
        table.add_row("measured", run.account.line(names=4))
    if reasons := list(kept_whole(run).values()):
        others = f" {len(reasons) - 1} more likewise." if len(reasons) > 1 else ""
        table.add_row("kept whole", reasons[0] + others)
    return table


def passed_over_lines(passed_over: Mapping[str, str]) -> list[str]:
    """What lies beside a run and is no part of it, with the reasons; one line for many alike."""
    groups: dict[str, list[str]] = {}
    for name, reason in passed_over.items():
        groups.setdefault(reason, []).append(name)
    return [f"passed over {abridged(names, 4)}: {reason}" for reason, names in groups.items()]


def _relative_places(run: Run) -> list[str]:
    above = run.path.rstrip("/") + "/"
    return [
        each.removeprefix(above) if each.startswith(above) else each.rpartition("/")[2]
        for each in run.places.values()
    ]


def matrices_table(run: Run) -> Table:
    """One row per matrix of a run."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("matrix", "layer", "module", "shape"):
        table.add_column(column)
    for info in run.matrices.values():
        layer = "" if info.layer is None else str(info.layer)
        table.add_row(info.name, layer, info.module, f"{info.rows} × {info.cols}")
    return table


def verification_lines(verification: Verification, records: int) -> list[str]:
    """What a verification of a recording says besides the damages."""
    lines = [f"{verification.sound} of {records} records hold what was written"]
    if verification.unchecked:
        lines.append(f"{verification.unchecked} records have no checksum to compare with")
    return lines + [f"not part of any record, harmless: {key}" for key in verification.leftovers]


def audit_table(report: Report) -> Table:
    """One row per check: its verdict, its worst number against the threshold, where, and why."""
    table = Table(title=Text(f"Audit of {report.run}"), box=box.SIMPLE_HEAD)
    for column in ("check", "verdict"):
        table.add_column(column, no_wrap=True)
    for column in ("measured", "at most"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("worst case, and what it means")
    for each in report.summaries:
        worst = each.worst
        numbers = (worst.measured, worst.threshold)
        table.add_row(
            each.check,
            Text(str(each.severity), style=_COLORS[each.severity]),
            *("" if number is None else f"{number:.3g}" for number in numbers),
            _explained(each),
        )
    return table


def _explained(summary: Summary) -> str:
    worst = summary.worst
    where = [worst.matrix] if worst.matrix else []
    where += [f"step {worst.step}"] if worst.step is not None else []
    total = sum(summary.counts.values())
    if total > 1:
        where.append(f"{summary.counts[summary.severity]} of {total}")
    return f"{', '.join(where)}: {worst.meaning}" if where else worst.meaning


def _groups(dataset: xr.Dataset, several: bool) -> list[tuple[str, xr.Dataset]]:
    if several:
        inside = dataset.sel({schema.MATRIX: dataset["layer"] != schema.NO_LAYER})
        rows = inside if inside.sizes[schema.MATRIX] else dataset
        return [(run, rows.sel({schema.RUN: run})) for run in rows[schema.RUN].values.tolist()]
    modules = dict.fromkeys(dataset["module"].values.tolist())
    return [(m, dataset.sel({schema.MATRIX: dataset["module"] == m})) for m in modules]


def _is_measured(dataset: xr.Dataset) -> xr.DataArray:
    """Which cells hold numbers; a difference has no status."""
    if schema.STATUS in dataset:
        return dataset[schema.STATUS] == Status.MEASURED
    return dataset[metric_names(dataset)[0]].notnull()


def _measured_steps(dataset: xr.Dataset) -> tuple[str, str | None]:
    """(first → last measured step, those of the kinds and runs that have others)."""
    measured = dataset[_MEASURED].any(schema.MATRIX)
    steps = dataset[schema.STEP].values
    of_all = _range(steps[measured.any([d for d in measured.dims if d != schema.STEP]).values])
    others: dict[str, list[str]] = {}
    for kind in dataset[schema.KIND].values.tolist():
        of_kind = measured.sel({schema.KIND: kind})
        runs = (
            [each.item() for each in of_kind.coords[schema.RUN]]
            if schema.RUN in of_kind.dims
            else [None]
        )
        ranges = [
            _range(steps[(of_kind if run is None else of_kind.sel({schema.RUN: run})).values])
            for run in runs
        ]
        if len(set(ranges)) == 1:
            others.setdefault(ranges[0], []).append(kind)
        else:
            for run, each in zip(runs, ranges, strict=True):
                others.setdefault(each, []).append(f"{kind} of {run}")
    named = [
        f"{', '.join(who)}: {each}" for each, who in others.items() if each not in ("", of_all)
    ]
    return of_all, "; ".join(named) or None


def _range(steps: np.ndarray) -> str:
    return f"{steps[0]} → {steps[-1]}" if steps.size else ""


def _first_to_last(values: xr.DataArray) -> str:
    mean = values.mean(schema.MATRIX).dropna(schema.STEP).values
    if mean.size == 0:
        return "-"
    first, last = _number(mean[0]), _number(mean[-1])
    return last if first == last else f"{first} → {last}"


def _number(value: float) -> str:
    return f"{value:.3g}" if np.abs(value) < 1000 else f"{value:.2e}"
