"""The command `dynamics`: every verb is one call of the library.

Exit codes: 0 done; 1 done, but something in the run could not be measured; 2 nothing was done.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamics import schema
from dynamics.cli.options import (
    AdapterOption,
    AlphaOption,
    BaseOption,
    BlocksOption,
    ComponentsOption,
    DeviceOption,
    FormatOption,
    FusedOption,
    KindsOption,
    LagOption,
    Listing,
    MetricsOption,
    NoCacheOption,
    OverwriteOption,
    RunPaths,
    SchedulerOption,
    SelectOption,
    StepsOption,
    StrictOption,
    Style,
    Target,
    WorkersOption,
)
from dynamics.cli.output import (
    error_console,
    print_account,
    print_line,
    print_table,
    print_warning,
    progress_bar,
    report_problems,
)
from dynamics.cli.values import choice_of, execution_of, named_paths, run_name, run_of, stem_of
from dynamics.errors import DynamicsError

if TYPE_CHECKING:
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
    "  dynamics analyze ckpts/*.pt\n\n"
    "A second time with the same output, it measures only what is new."
)
def analyze(
    run: RunPaths,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Where to save the result; RUN.analysis.zarr by default."
        ),
    ] = None,
    metrics: MetricsOption = None,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    steps: StepsOption = None,
    select: SelectOption = None,
    lag: LagOption = None,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    keep_fused: FusedOption = False,
    overwrite: OverwriteOption = False,
    strict: StrictOption = False,
    no_cache: NoCacheOption = False,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Measure a run in progress again and again, until Ctrl-C."),
    ] = False,
    interval: Annotated[
        float | None,
        typer.Option(
            "--interval",
            min=0.1,
            help="Seconds that --follow waits between two looks; 10 by default.",
        ),
    ] = None,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure a run and save the result. What an earlier result has is not measured again."""
    from dynamics.analysis.saved import analyze_and_save, follow_and_save
    from dynamics.cli.tables import passed_over_lines, summary_table
    from dynamics.formats import open_run

    if interval is not None and not follow:
        raise DynamicsError(
            "--interval has no effect without --follow; leave one out, or add the other."
        )
    output = output or Path(f"{run_name(run)}.analysis.zarr")
    execution = execution_of(output, no_cache, strict, workers, scheduler, device)
    choice = choice_of(metrics, components, kinds, steps, select, lag)
    opened = partial(
        open_run,
        run_of(run),
        format=format,
        base=base,
        adapter=adapter,
        lora_alpha=lora_alpha,
        expert_blocks=expert_blocks,
        split_fused=not keep_fused,
    )
    if follow:
        from dynamics.cli.following import until_signalled

        with until_signalled() as stopped:
            problems = follow_and_save(
                opened,
                output,
                execution,
                stopped=stopped,
                say=print_line,
                interval=10.0 if interval is None else interval,
                overwrite=overwrite,
                **choice,
            )
        return report_problems(problems)
    with progress_bar(run_name(run)) as progress:
        result = analyze_and_save(
            opened, output, execution, overwrite=overwrite, progress=progress, **choice
        )
    print_table(summary_table(result))
    print_account(result.attrs["account"])
    for line in passed_over_lines(json.loads(result.attrs["passed_over"])):
        print_line(line)
    print_line(f"Saved to {output}")
    report_problems(json.loads(result.attrs["problems"]))


@app.command(
    epilog="Examples:\n\n  dynamics compare full=full/run.zarr lora=lora/run.zarr -o both.zarr\n\n"
    "  dynamics compare a=a.analysis.zarr b=b.analysis.zarr --baseline a\n\n"
    "  dynamics compare a=a/checkpoints b=b/checkpoints --steps 0:1000 --workers 2"
)
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=RUN...", help="Two or more runs or saved analyses, each with a name."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where to save the result.")
    ] = Path("comparison.zarr"),
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Save the differences from this run instead.")
    ] = None,
    metrics: MetricsOption = None,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    steps: StepsOption = None,
    select: SelectOption = None,
    lag: LagOption = None,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    keep_fused: FusedOption = False,
    overwrite: OverwriteOption = False,
    strict: StrictOption = False,
    no_cache: NoCacheOption = False,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Measure runs, or take saved analyses, and align them side by side."""
    from dynamics.analysis.saved import compare_and_save
    from dynamics.analysis.storage import is_analysis
    from dynamics.cli.tables import summary_table
    from dynamics.formats import open_run

    opened = partial(
        open_run,
        format=format,
        base=base,
        adapter=adapter,
        lora_alpha=lora_alpha,
        expert_blocks=expert_blocks,
        split_fused=not keep_fused,
    )
    given: dict[str, Path | Run] = {
        name: Path(path) if is_analysis(path) else opened(path)
        for name, path in named_paths(runs).items()
    }
    execution = execution_of(output, no_cache, strict, workers, scheduler, device)
    choice = choice_of(metrics, components, kinds, steps, select, lag)
    with progress_bar(", ".join(given)) as progress:
        both = compare_and_save(
            given,
            output,
            execution,
            baseline=baseline,
            overwrite=overwrite,
            progress=progress,
            **choice,
        )
    print_table(summary_table(both))
    for name, account in json.loads(both.attrs["account"]).items():
        print_account(json.dumps(account), f"{name}: ")
    print_line(f"Saved to {output}")
    measured = [name for name, each in given.items() if not isinstance(each, Path)]
    problems = json.loads(both.attrs["problems"])
    report_problems([f"{name}: {each}" for name in measured for each in problems[name]])


@app.command(
    epilog="Examples:\n\n  dynamics plot run.analysis.zarr --metric effective_rank --by layer\n\n"
    "  dynamics plot comparison.zarr --metric stable_rank --kind update -o stable.png\n\n"
    "  dynamics plot run.analysis.zarr --style spectrum --matrix model.layers.0.mlp.up_proj.weight"
)
def plot(
    result: Annotated[Path, typer.Argument(help="A result that 'analyze' or 'compare' saved.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="A PNG, PDF or SVG file; RESULT.STYLE.METRIC.KIND.png by default.",
        ),
    ] = None,
    style: Annotated[
        Style | None,
        typer.Option("--style", help="By default comparison for several runs, else trajectory."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="The metric to draw; effective_rank by default.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", help="The kind of matrix to draw.")
    ] = schema.WEIGHT,
    by: Annotated[
        str | None,
        typer.Option(
            "--by", help="For trajectories: one line per module (the default), layer or matrix."
        ),
    ] = None,
    module: Annotated[
        str | None, typer.Option("--module", help="For heatmaps and comparisons: only this module.")
    ] = None,
    matrix: Annotated[
        str | None, typer.Option("--matrix", help="For spectra: the name of the matrix.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Draw only this run of a comparison.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw a figure of a saved result."""
    import matplotlib

    matplotlib.use("Agg")
    from dynamics.analysis import comparison, storage
    from dynamics.plots.figure_files import save_figure

    dataset = storage.load(result)
    if run is not None:
        dataset = comparison.select_run(dataset, run)
    output = save_figure(
        dataset,
        output,
        stem=stem_of(result),
        style=style and style.value,
        metric=metric,
        kind=kind,
        by=by,
        module=module,
        matrix=matrix,
        overwrite=overwrite,
    )
    print_line(f"Saved to {output}")


@app.command(
    epilog="Examples:\n\n  dynamics inspect demo/relora/run.zarr\n\n"
    "  dynamics inspect run.zarr --verify"
)
def inspect(
    run: RunPaths,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    keep_fused: FusedOption = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read every number of a recording. Exit code 1: it is damaged."
        ),
    ] = False,
) -> None:
    """Show what a run holds: its format, steps, kinds, matrices, scalars and events."""
    from dynamics.cli.tables import (
        contents_table,
        matrices_table,
        passed_over_lines,
        verification_lines,
    )
    from dynamics.formats import open_run
    from dynamics.formats.recording import RecordingRun

    opened = open_run(
        run_of(run),
        format=format,
        base=base,
        adapter=adapter,
        lora_alpha=lora_alpha,
        expert_blocks=expert_blocks,
        split_fused=not (keep_fused or verify),
    )
    print_table(contents_table(opened))
    for line in passed_over_lines(opened.passed_over):
        print_line(line)
    print_table(matrices_table(opened))
    problems = [*opened.problems.values(), *dict.fromkeys(opened.absent_kinds.values())]
    if verify:
        if not isinstance(opened, RecordingRun):
            raise DynamicsError(
                f"{opened.path} is not a recording (its format is {opened.format!r}). Only "
                "recordings have checksums to verify; leave --verify out."
            )
        verification = opened.verify()
        for line in verification_lines(verification, len(opened.steps)):
            print_line(line)
        problems = [*verification.damaged, *problems]
    if opened.account is not None and (warning := opened.account.warning()):
        print_warning(warning)
    report_problems(problems)


@app.command(
    epilog="Examples:\n\n  dynamics audit demo/relora/run.zarr\n\n"
    "  dynamics audit checkpoints/ --json > audit.json"
)
def audit(
    run: RunPaths,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every verdict as JSON instead of a table.")
    ] = False,
) -> None:
    """Check a run for defects, such as wrong merges, dead layers, NaN. Exit code 1: one failed."""
    from dynamics.auditing import audit as audit_run
    from dynamics.cli.tables import audit_table
    from dynamics.formats import open_run

    opened = open_run(
        run_of(run),
        format=format,
        base=base,
        adapter=adapter,
        lora_alpha=lora_alpha,
        expert_blocks=expert_blocks,
    )
    report = audit_run(opened)
    if as_json:
        print(report.to_json())
    else:
        print_table(audit_table(report))
        print_line(report.line)
    if report.failed:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:\n\n  dynamics export run.analysis.zarr --to csv\n\n"
    "  dynamics export comparison.zarr --to parquet --spectra\n\n"
    "  dynamics export comparison.zarr --to wandb --metrics effective_rank --kinds weight,update"
)
def export(
    result: Annotated[Path, typer.Argument(help="A result that 'analyze' or 'compare' saved.")],
    to: Annotated[Target, typer.Option("--to", help="The file format or the tracker.")],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="A file, the folder of a tracker, or a URI of MLflow; by default RESULT.csv, ..., "
            "and where a tracker keeps its runs.",
        ),
    ] = None,
    spectra: Annotated[
        bool, typer.Option("--spectra", help="For files: add the singular values.")
    ] = False,
    metrics: MetricsOption = None,
    kinds: KindsOption = None,
    project: Annotated[
        str | None,
        typer.Option("--project", help="Of W&B and trackio, the experiment of MLflow."),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Save a result as a table, or log means over layers to a tracker."""
    from dynamics.analysis import storage
    from dynamics.exports.export import export as export_result

    chosen = choice_of(metrics, None, kinds, None, None, None)
    line = export_result(
        storage.load(result, without=() if spectra else (schema.SINGULAR_VALUE,)),
        to.value,
        output,
        stem=stem_of(result),
        spectra=spectra,
        metrics=chosen["metrics"],
        kinds=chosen["kinds"],
        project=project,
        overwrite=overwrite,
    )
    print_line(line)


@app.command("list", epilog="Example:\n\n  dynamics list metrics")
def list_(what: Annotated[Listing, typer.Argument()] = Listing.metrics) -> None:
    """List what can be measured and read: metrics, kinds, components, formats."""
    from rich import box

    from dynamics.cli.tables import Table
    from dynamics.formats import FORMATS
    from dynamics.metrics import METRICS

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(what.value.removesuffix("s"), no_wrap=True)
    table.add_column("meaning")
    if what is Listing.metrics:
        table.add_column("reference")
        for name, metric in METRICS.items():
            table.add_row(name, metric.long_name, metric.reference)
    elif what is Listing.formats:
        for format in FORMATS:
            table.add_row(format.name, format.description)
    else:
        meanings = schema.KINDS if what is Listing.kinds else schema.COMPONENTS
        for name, meaning in meanings.items():
            table.add_row(name, meaning)
    print_table(table)


def main() -> None:
    """Run `dynamics`: a user's error is one line on stderr and exit code 2."""
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
