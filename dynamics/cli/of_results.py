"""The verbs that read saved results: plot, export, show."""

from pathlib import Path
from typing import Annotated

import typer

from dynamics import schema
from dynamics.cli.options import (
    KindsOption,
    MetricsOption,
    OverwriteOption,
    Style,
    Target,
)
from dynamics.cli.output import (
    print_accounts,
    print_line,
    print_table,
    print_warning,
    problems_of,
)
from dynamics.cli.values import choice_of, stem_of, step_numbers, width_of


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
        str | None,
        typer.Option(
            "--kind",
            help="The kind of matrix to draw; weight by default, and displacement for staircases "
            "and budgets.",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            help="For trajectories and budgets: one line or bar per module (the default), layer, "
            "expert or matrix.",
        ),
    ] = None,
    panels: Annotated[
        str | None,
        typer.Option(
            "--panels", help="One panel per run, kind, module, layer or expert, on one scale."
        ),
    ] = None,
    module: Annotated[str | None, typer.Option("--module", help="Only this module.")] = None,
    matrix: Annotated[
        str | None, typer.Option("--matrix", help="For spectra: the name of the matrix.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Draw only this run of a comparison.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="For differences: the run to subtract.")
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(
            "--over", help="Average runs that differ in this setting alone, such as seed."
        ),
    ] = None,
    x: Annotated[
        str | None, typer.Option("--x", help="Draw along step (the default), tokens or epoch.")
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", help="For spectra: the steps to draw, separated by commas."),
    ] = None,
    slides: Annotated[
        bool, typer.Option("--slides", help="Size and fonts of slides in place of paper.")
    ] = False,
    width: Annotated[
        str | None,
        typer.Option(
            "--width", help="column (3.4 inches, the default), page (6.75 inches), or inches."
        ),
    ] = None,
    height: Annotated[float | None, typer.Option("--height", help="Inches.")] = None,
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
    output, caption = save_figure(
        dataset,
        output,
        stem=stem_of(result),
        style=style and style.value,
        panels=panels,
        slides=slides,
        width=width_of(width),
        height=height,
        overwrite=overwrite,
        metric=metric,
        kind=kind,
        by=by,
        module=module,
        matrix=matrix,
        baseline=baseline,
        over=over,
        x=x,
        steps=step_numbers(steps),
    )
    print_line(f"Saved to {output}")
    print_line(caption)


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


def show(
    result: Annotated[Path, typer.Argument(help="A result that 'analyze' or 'compare' saved.")],
) -> None:
    """Show what a saved result holds, what made it, and its table."""
    from dynamics.analysis import storage
    from dynamics.cli.tables import result_table, summary_table

    dataset = storage.load(result)
    print_table(result_table(dataset, result))
    print_table(summary_table(dataset))
    print_accounts(dataset)
    for problem in problems_of(dataset.attrs):
        print_warning(problem)
