"""The command `dynamics`: every verb is one call of the library.

Exit codes: 0 done; 1 done, but something in the run could not be measured; 2 nothing was done.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamics import schema
from dynamics.cli.options import (
    AdapterOption,
    BaseOption,
    ComponentsOption,
    FormatOption,
    FusedOption,
    KindsOption,
    Listing,
    MetricsOption,
    OverwriteOption,
    RunPath,
    SelectOption,
    StepsOption,
    Style,
)
from dynamics.cli.output import console, error_console, print_line, progress_bar, report_problems
from dynamics.cli.values import (
    abridged,
    named_paths,
    run_name,
    split,
    step_ranges,
    steps_of,
    steps_so_far,
)
from dynamics.errors import DynamicsError

if TYPE_CHECKING:
    import xarray as xr

    from dynamics.runs.run import Run

app = typer.Typer(
    name="dynamics",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Measure how the rank of weights, gradients and updates evolves in a training run.",
)


@app.command(
    epilog="Examples:\n\n  dynamics analyze demo/relora/run.zarr\n\n"
    "  dynamics analyze checkpoints/ -o ranks.zarr --kinds weight,update --steps 0:1000\n\n"
    "  dynamics analyze run.zarr --follow\n\n"
    "  dynamics analyze checkpoints/ --workers 8\n\n"
    "Again with the same output, it measures only what is new."
)
def analyze(
    run: RunPath,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Result, a Zarr directory; RUN.analysis.zarr here."),
    ] = None,
    metrics: MetricsOption = None,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    steps: StepsOption = None,
    select: SelectOption = None,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    keep_fused: FusedOption = False,
    overwrite: OverwriteOption = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first unreadable file, NaN or Inf.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no spectra beside the output (OUTPUT.cache).")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep up with a run in progress until interrupted.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, help="Seconds between looks of --follow.")
    ] = 10.0,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="How many processes measure.")
    ] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", help="A Dask scheduler's address or file; its workers measure."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, or cuda: a GPU measures what it is faster at.")
    ] = "cpu",
) -> None:
    """Measure a run and save the result; what an earlier result has is not measured again."""
    from dynamics.analysis import storage
    from dynamics.analysis.analyze import measure
    from dynamics.analysis.selection import selected
    from dynamics.cli.tables import summary_table
    from dynamics.formats import open_run

    output = output or Path(f"{run_name(run)}.analysis.zarr")
    choice: dict[str, Any] = {
        "metrics": split(metrics),
        "components": split(components),
        "kinds": split(kinds),
        "select": select or None,
    }
    who: dict[str, Any] = {"workers": workers, "scheduler": scheduler, "device": device}
    cache = None if no_cache else output.with_name(f"{output.name.removesuffix('.zarr')}.cache")
    ranges = step_ranges(steps)
    open_it = partial(
        open_run, run, format=format, base=base, adapter=adapter, split_fused=not keep_fused
    )
    if not storage.is_analysis(output):
        storage.check_output(output, overwrite=overwrite)
    if follow:
        from dynamics.cli.following import follow_and_save

        problems = follow_and_save(
            open_it,
            output,
            overwrite=overwrite,
            say=print_line,
            interval=interval,
            steps=lambda opened: steps_so_far(opened, ranges),
            cache=cache,
            strict=strict,
            **who,
            **choice,
        )
        return report_problems(problems)
    opened = open_it()
    chosen = selected(opened, steps=steps_of(opened, ranges), **choice)
    storage.check_update(output, chosen, overwrite=overwrite)
    with progress_bar(run) as progress:
        result = measure(chosen, cache=cache, strict=strict, progress=progress, **who)
    if not overwrite:
        storage.check_kept(output, result)
    storage.save(result, output, overwrite=overwrite or output.exists())
    console().print(summary_table(result))
    print_line(f"Saved to {output}")
    report_problems(json.loads(result.attrs["problems"]))


@app.command(
    epilog="Examples:\n\n  dynamics compare full=full/run.zarr lora=lora/run.zarr -o both.zarr\n\n"
    "  dynamics compare a=a.analysis.zarr b=b.analysis.zarr --baseline a"
)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="NAME=RUN...", help="Two or more runs, or saved analyses."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Result, a Zarr directory.")
    ] = Path("comparison.zarr"),
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Save differences from this run instead.")
    ] = None,
    metrics: MetricsOption = None,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    select: SelectOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure runs, or take analyses, and align them side by side."""
    from dynamics.analysis import analyze, comparison, storage
    from dynamics.cli.tables import summary_table
    from dynamics.formats import open_run

    storage.check_output(output, overwrite=overwrite)
    paths = named_paths(runs)
    if baseline is not None and baseline not in paths:
        raise DynamicsError(f"--baseline {baseline!r} is none of {', '.join(paths)}.")
    analyses: dict[str, xr.Dataset] = {}
    problems: list[str] = []
    for name, path in paths.items():
        if storage.is_analysis(path):
            analyses[name] = storage.load(path)
            continue
        with progress_bar(path) as progress:
            analyses[name] = analyze.analyze(
                open_run(path),
                metrics=split(metrics),
                components=split(components),
                kinds=split(kinds),
                select=select or None,
                progress=progress,
            )
        problems += [f"{name}: {each}" for each in json.loads(analyses[name].attrs["problems"])]
    both = comparison.compare(analyses)
    console().print(summary_table(both))
    result = both if baseline is None else comparison.difference(both, baseline=baseline)
    storage.save(result, output, overwrite=overwrite)
    print_line(f"Saved to {output}")
    report_problems(problems)


@app.command(
    epilog="Examples:\n\n  dynamics plot run.analysis.zarr --metric effective_rank --by layer\n\n"
    "  dynamics plot comparison.zarr --metric stable_rank --kind update -o stable.png\n\n"
    "  dynamics plot run.analysis.zarr --style spectrum --matrix model.layers.0.mlp.up_proj.weight"
)
def plot(
    result: Annotated[Path, typer.Argument(help="What 'analyze' or 'compare' saved.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="PNG, PDF or SVG; RESULT.STYLE.METRIC.KIND.png here."),
    ] = None,
    style: Annotated[
        Style | None,
        typer.Option("--style", help="Default: comparison for several runs, else trajectory."),
    ] = None,
    metric: Annotated[str, typer.Option("--metric")] = "effective_rank",
    kind: Annotated[str, typer.Option("--kind")] = schema.WEIGHT,
    by: Annotated[
        str, typer.Option("--by", help="trajectory: a line per module, layer or matrix.")
    ] = "module",
    module: Annotated[
        str | None, typer.Option("--module", help="heatmap, comparison: one module only.")
    ] = None,
    matrix: Annotated[
        str | None, typer.Option("--matrix", help="spectrum: the parameter's name.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="One run of a comparison, for the other styles.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a figure of a saved result."""
    import matplotlib

    matplotlib.use("Agg")
    from dynamics import plots
    from dynamics.analysis import comparison, storage

    dataset = storage.load(result)
    if run is not None:
        dataset = comparison.select_run(dataset, run)
    several = schema.RUN in dataset.dims
    style = style or (Style.comparison if several else Style.trajectory)
    if style is Style.spectrum:
        metric = schema.SINGULAR_VALUE
    stem = result.resolve().name.removesuffix(".zarr").removesuffix(".analysis")
    output = output or Path(f"{stem}.{style.value}.{metric}.{kind}.png")
    if output.exists() and not overwrite:
        raise DynamicsError(f"{output} exists; choose another output or add --overwrite.")
    if style is Style.trajectory:
        ax = plots.plot_trajectory(dataset, metric, kind=kind, by=by)
    elif style is Style.heatmap:
        ax = plots.plot_heatmap(dataset, metric, kind=kind, module=module)
    elif style is Style.comparison:
        ax = plots.plot_comparison(dataset, metric, kind=kind, module=module)
    elif matrix is None:
        raise DynamicsError("--style spectrum needs --matrix NAME; 'dynamics inspect' lists them.")
    else:
        ax = plots.plot_spectrum(dataset, matrix, kind=kind)
    try:
        figure = ax.get_figure(root=True)
        assert figure is not None
        figure.savefig(output, dpi=150)
    except (ValueError, OSError) as error:
        raise DynamicsError(f"Cannot draw {output}: {error}.") from error
    print_line(f"Saved to {output}")


@app.command(
    epilog="Examples:\n\n  dynamics inspect demo/relora/run.zarr\n\n"
    "  dynamics inspect run.zarr --verify"
)
def inspect(
    run: RunPath,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    keep_fused: FusedOption = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every number of a recording; exit code 1: damaged."),
    ] = False,
) -> None:
    """Say what a run holds: its format, steps, kinds, matrices, scalars and events."""
    from rich.table import Table

    from dynamics.formats import open_run
    from dynamics.runs.fused import kept_whole

    opened = open_run(
        run, format=format, base=base, adapter=adapter, split_fused=not (keep_fused or verify)
    )
    facts = Table(show_header=False, box=None)
    facts.add_row("path", opened.path)
    facts.add_row("format", opened.format)
    facts.add_row("steps", abridged([str(step) for step in opened.steps]))
    facts.add_row("kinds", ", ".join(opened.kinds))
    facts.add_row("scalars", ", ".join(opened.scalars) or "none")
    events = [f"{event.kind} at {event.step}" for event in opened.events]
    facts.add_row("events", abridged(events) or "none")
    if whole := list(kept_whole(opened).values()):
        others = f" {len(whole) - 1} more likewise." * (len(whole) > 1)
        facts.add_row("kept whole", whole[0] + others)
    console().print(facts)
    matrices = Table("matrix", "layer", "module", "shape")
    for info in opened.matrices.values():
        layer = "" if info.layer is None else str(info.layer)
        matrices.add_row(info.name, layer, info.module, f"{info.rows} × {info.cols}")
    console().print(matrices)
    if verify:
        _verify(opened)
    report_problems([*opened.problems.values(), *dict.fromkeys(opened.absent_kinds.values())])


@app.command(
    epilog="Examples:\n\n  dynamics audit demo/relora/run.zarr\n\n"
    "  dynamics audit checkpoints/ --json > audit.json"
)
def audit(
    run: RunPath,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every verdict as JSON instead of a table.")
    ] = False,
) -> None:
    """Check a run for defects: merges, resets, dead or frozen layers, NaN. Exit code 1: failed."""
    from dynamics.auditing import audit as audited
    from dynamics.cli.tables import audit_table
    from dynamics.formats import open_run

    report = audited(open_run(run, format=format, base=base, adapter=adapter))
    if as_json:
        print(report.to_json())
    else:
        console().print(audit_table(report))
        print_line(report.line)
    if report.failed:
        raise typer.Exit(1)


@app.command("list", epilog="Example:\n\n  dynamics list metrics")
def list_(what: Annotated[Listing, typer.Argument()] = Listing.metrics) -> None:
    """List what can be measured and read: metrics, kinds, components, formats."""
    from rich.table import Table

    from dynamics.formats import FORMATS
    from dynamics.metrics import METRICS

    table = Table(what.value.removesuffix("s"), "meaning")
    if what is Listing.metrics:
        table.add_column("reference")
        for name, metric in METRICS.items():
            table.add_row(name, metric.long_name, metric.reference)
    elif what is Listing.formats:
        for known in FORMATS:
            table.add_row(known.format, known.description)
    else:
        meanings = schema.KINDS if what is Listing.kinds else schema.COMPONENTS
        for name, meaning in meanings.items():
            table.add_row(name, meaning)
    console().print(table)


def main() -> None:
    """The console script `dynamics`."""
    run_app(app)


def run_app(command: typer.Typer) -> None:
    """Run a command line; a user's error is one line on stderr and exit code 2."""
    try:
        command()
    except DynamicsError as error:
        error_console().print(
            f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _verify(run: "Run") -> None:
    from dynamics.formats.recording import RecordingRun

    if not isinstance(run, RecordingRun):
        raise DynamicsError(f"{run.path} is no recording; only these have checksums to verify.")
    found = run.verify()
    lines = [f"{found.sound} of {len(run.steps)} records hold what was written"]
    if found.unchecked:
        lines.append(f"{found.unchecked} records have no checksum to compare with")
    lines += [f"not part of any record, harmless: {key}" for key in found.leftovers]
    for line in lines:
        print_line(line)
    report_problems(list(found.damaged))
