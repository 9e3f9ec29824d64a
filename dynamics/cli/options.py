"""What several verbs of the command line take: arguments, options, choices."""

from enum import StrEnum
from typing import Annotated

import typer

RunPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="The path or URL of a recording, of a directory of checkpoints, or of one; or several "
        "checkpoints of one run, or a glob of them; or hf://ORG/NAME, a model on the hub.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="The format, where it is not to be detected; see 'dynamics list formats'."
    ),
]
RevisionsOption = Annotated[
    str | None,
    typer.Option(
        "--revisions",
        help='Of a model on the hub, the branches and tags that are the steps: "stage1-*".',
    ),
]
RefPatternOption = Annotated[
    str | None,
    typer.Option(
        "--ref-pattern",
        metavar="REGEX",
        help="Of a model on the hub: what finds the step in names of branches and tags, in its "
        'group "step" or its first group: "run-a_([0-9]+)k".',
    ),
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Fetch from the hub without asking, however much it is.")
]
FusedOption = Annotated[
    bool,
    typer.Option("--keep-fused", help="Measure fused matrices (c_attn) as a whole, not in parts."),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", help="The base model of PEFT adapters, where it is not stored beside them."
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", help="The name of the PEFT adapter, where checkpoints hold several."),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        "--lora-alpha", help="The alpha of LoRA, where checkpoints hold factors and no config."
    ),
]
BlocksOption = Annotated[
    bool,
    typer.Option(
        "--expert-blocks",
        help="Columns of lora_B of one expert lie together, as other tools than PEFT pack them.",
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option("--metrics", help="Metrics, separated by commas; by default all but study_*."),
]
ComponentsOption = Annotated[
    str | None,
    typer.Option("--components", help="Components, separated by commas; parameters by default."),
]
KindsOption = Annotated[
    str | None,
    typer.Option("--kinds", help="Kinds, separated by commas; by default all that the run has."),
]
StepsOption = Annotated[
    str | None,
    typer.Option(
        "--steps", help="Steps and ranges FIRST:LAST, separated by commas; all by default."
    ),
]
SelectOption = Annotated[
    list[str] | None,
    typer.Option(
        "--select", help='Only matrices with such names, e.g. "*_proj"; may be given several times.'
    ),
]
LagOption = Annotated[
    int | None,
    typer.Option(
        "--lag",
        min=1,
        help="Measure updates over so many optimizer steps, between recorded steps; by default "
        "from the previous record.",
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict", help="Stop at the first file that cannot be read, and at the first NaN or Inf."
    ),
]
NoCacheOption = Annotated[
    bool,
    typer.Option(
        "--no-cache", help="Do not keep spectra in a file beside the output (OUTPUT.cache)."
    ),
]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=1, help="The number of processes that measure.")
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler", help="The address or file of a Dask scheduler, whose workers measure."
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, or cuda: a GPU measures the matrices that it is faster at."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists.")
]


class Style(StrEnum):
    """The figures that `dynamics plot` draws."""

    trajectory = "trajectory"
    comparison = "comparison"
    difference = "difference"
    heatmap = "heatmap"
    spectrum = "spectrum"
    spectra = "spectra"
    staircase = "staircase"
    budget = "budget"
    loss = "loss"


class Target(StrEnum):
    """Where `dynamics export` can put a result."""

    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"
    json = "json"
    wandb = "wandb"
    tensorboard = "tensorboard"
    trackio = "trackio"
    mlflow = "mlflow"


class Listing(StrEnum):
    """The tables that `dynamics list` prints."""

    metrics = "metrics"
    kinds = "kinds"
    components = "components"
    formats = "formats"
