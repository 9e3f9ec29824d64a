"""The command `dynamics`: every verb is one call of the library.

Exit codes: 0 done; 1 done, but something in the run could not be measured; 2 nothing was done.
"""

from typing import Annotated

import typer

from dynamics import schema
from dynamics.cli.of_checks import audit, inspect
from dynamics.cli.of_report import report
from dynamics.cli.of_results import export, plot, show
from dynamics.cli.of_runs import analyze, compare
from dynamics.cli.options import Listing
from dynamics.cli.output import print_table
from dynamics.cli.running import Commands, run_app

app = typer.Typer(
    name="dynamics",
    no_args_is_help=True,
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command(
    epilog="Examples:\n\n  dynamics analyze demo/relora/run.zarr\n\n"
    "  dynamics analyze checkpoints/ -o ranks.zarr --kinds weight,update --steps 0:1000\n\n"
    "  dynamics analyze run.zarr --follow\n\n"
    "  dynamics analyze checkpoints/ --workers 8\n\n"
    "  dynamics analyze ckpts/*.pt\n\n"
    "A second time with the same output, it measures only what is new."
)(analyze)

app.command(
    epilog="Examples:\n\n  dynamics compare full=full/run.zarr lora=lora/run.zarr -o both.zarr\n\n"
    "  dynamics compare a=a.analysis.zarr b=b.analysis.zarr --baseline a\n\n"
    "  dynamics compare a=a/checkpoints b=b/checkpoints --steps 0:1000 --workers 2"
)(compare)

app.command(
    epilog="Examples:\n\n  dynamics plot run.analysis.zarr --metric effective_rank --by layer\n\n"
    "  dynamics plot comparison.zarr --metric stable_rank --kind update -o stable.png\n\n"
    "  dynamics plot run.analysis.zarr --style spectrum --matrix model.layers.0.mlp.up_proj.weight"
)(plot)

app.command(
    epilog="Examples:\n\n  dynamics inspect demo/relora/run.zarr\n\n"
    "  dynamics inspect run.zarr --verify"
)(inspect)

app.command(
    epilog="Examples:\n\n  dynamics audit demo/relora/run.zarr\n\n"
    "  dynamics audit checkpoints/ --json > audit.json"
)(audit)

app.command(
    epilog="Examples:\n\n  dynamics export run.analysis.zarr --to csv\n\n"
    "  dynamics export comparison.zarr --to parquet --spectra\n\n"
    "  dynamics export comparison.zarr --to wandb --metrics effective_rank --kinds weight,update"
)(export)

app.command(
    epilog="Examples:\n\n  dynamics report run.zarr\n\n"
    "  dynamics report full=full/run.zarr relora=relora/run.zarr -o both.html\n\n"
    "  dynamics report comparison.zarr\n\n"
    "  dynamics report run.zarr --follow"
)(report)

app.command(
    epilog="Examples:\n\n  dynamics show run.analysis.zarr\n\n  dynamics show comparison.zarr"
)(show)


@app.command("list", epilog="Example:\n\n  dynamics list metrics")
def list_(what: Annotated[Listing, typer.Argument()] = Listing.metrics) -> None:
    """List what can be measured and read: metrics, kinds, components, formats."""
    from rich import box

    from dynamics.cli.tables import Table
    from dynamics.formats import FORMATS
    from dynamics.metrics import METRICS, STUDY_METRICS

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(what.value.removesuffix("s"), no_wrap=True)
    table.add_column("meaning")
    if what is Listing.metrics:
        table.add_column("reference")
        for name, metric in (METRICS | STUDY_METRICS).items():
            table.add_row(name, metric.long_name, metric.reference)
    elif what is Listing.formats:
        for format in FORMATS:
            table.add_row(format.name, format.description)
    else:
        meanings = schema.KINDS if what is Listing.kinds else schema.COMPONENTS
        for name, meaning in meanings.items():
            table.add_row(name, meaning)
    print_table(table)


@app.command(epilog="Example:\n\n  dynamics doctor")
def doctor() -> None:
    """Show what is installed here, which devices and libraries compute, and where caches lie."""
    from dynamics.cli.doctor import diagnosis
    from dynamics.cli.tables import diagnosis_table

    print_table(diagnosis_table(diagnosis()))


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"dynamics {version('learning-dynamics')}")
        raise typer.Exit


@app.callback()
def dynamics(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Measure how the rank of weights, gradients and updates evolves in a training run."""


def main() -> None:
    """Run `dynamics`: a user's error is one line on stderr and exit code 2."""
    run_app(app)
