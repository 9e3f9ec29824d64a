"""What several verbs of the command line take: arguments, options, choices."""

from enum import StrEnum
from typing import Annotated

import typer

RunPath = Annotated[
    str, typer.Argument(help="A recording, checkpoints or one checkpoint: a path or a URL.")
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Force a format instead of detecting it.")
]
FusedOption = Annotated[
    bool, typer.Option("--keep-fused", help="Measure fused matrices (c_attn) whole, not in parts.")
]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="Base model of PEFT adapters that have none beside.")
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="One of several PEFT adapters of a checkpoint.")
]
MetricsOption = Annotated[
    str | None, typer.Option("--metrics", help="Comma-separated; all by default.")
]
ComponentsOption = Annotated[
    str | None, typer.Option("--components", help="Comma-separated; parameters by default.")
]
KindsOption = Annotated[
    str | None, typer.Option("--kinds", help="Comma-separated; all that the run has by default.")
]
StepsOption = Annotated[
    str | None,
    typer.Option("--steps", help="Comma-separated steps and ranges FIRST:LAST; all by default."),
]
SelectOption = Annotated[
    list[str] | None,
    typer.Option("--select", help='Glob over parameter names, e.g. "*_proj"; may be repeated.'),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Stop at the first unreadable file, NaN or Inf.")
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Keep no spectra beside the output (OUTPUT.cache).")
]
WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="How many processes measure.")]
SchedulerOption = Annotated[
    str | None,
    typer.Option("--scheduler", help="A Dask scheduler's address or file; its workers measure."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, or cuda: a GPU measures what it is faster at.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that exists.")
]


class Style(StrEnum):
    """The figures that `dynamics plot` draws."""

    trajectory = "trajectory"
    spectrum = "spectrum"
    heatmap = "heatmap"
    comparison = "comparison"


class Listing(StrEnum):
    """The tables that `dynamics list` prints."""

    metrics = "metrics"
    kinds = "kinds"
    components = "components"
    formats = "formats"
