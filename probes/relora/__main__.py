"""The command line of the ReLoRA experiment: python -m probes.relora."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamics.cli.running import Commands, goes_on, run_app
from probes.relora.config import METHODS

if TYPE_CHECKING:
    from probes.relora.evaluation.evaluations import Evaluation

PresetArgument = Annotated[str, typer.Argument(help="micro, or tiny or small (as published).")]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="Train on the .txt files of this folder.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Train on tokens: a dataset's name, or parquet or Arrow."),
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")]
PublishedOption = Annotated[
    bool, typer.Option("--as-published", help="Train with the defects of the published code.")
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Only the first pairs of each paradigm and texts of each domain."
    ),
]

_METHOD = f"One of {', '.join(METHODS)}."

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def relora() -> None:
    """Train small language models with ReLoRA and at full rank, and compare them."""


@app.command(epilog="Example:\n\n  python -m probes.relora demo demo --text folder/with/txt/files")
def demo(
    output: Annotated[Path, typer.Argument(help="A new folder for everything it writes.")] = Path(
        "demo"
    ),
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Folder of .txt files. Default: the sources of Python's standard library.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the run.")] = 0,
) -> None:
    """Train a full-rank run and its ReLoRA twin; measure, compare and draw both."""
    from probes.relora import train  # noqa: F401  # or one line that names what is missing
    from probes.relora.demo import demo_config, run_demo

    run_demo(output, demo_config(seed), text=text)


@app.command(
    epilog="Examples:\n\n  python -m probes.relora train micro --method relora --output runs/relora"
    "\n\n  python -m probes.relora train micro --method full_rank --output runs/full_rank"
)
def train(
    preset: PresetArgument,
    output: Annotated[Path, typer.Option("--output", help="The folder of the run.")],
    method: Annotated[str, typer.Option("--method", help=_METHOD)] = "relora",
    text: TextOption = None,
    data: DataOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the run.")] = None,
    steps: StepsOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="field=value; any field of TrainConfig.")
    ] = None,
    published: PublishedOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Record the run.")] = True,
    blimp: Annotated[
        Path | None, typer.Option("--blimp", help="While training, evaluate on these BLiMP files.")
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", help="While training, evaluate on these texts."),
    ] = None,
    limit: LimitOption = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", help="Trackers: tensorboard, wandb, trackio, ..."),
    ] = None,
) -> None:
    """Train one run of the reference experiment, recorded into OUTPUT/run.zarr."""
    from probes.relora.experiment import run_experiment
    from probes.relora.settings import config_from_words

    goes_on("Stopped. The same command with --resume goes on from the last checkpoint.")
    config = config_from_words(
        preset,
        method,
        {"seed": seed, "max_steps": steps, **_source(text, data)},
        settings or [],
        published=published,
    )
    run_experiment(
        config,
        output,
        text=text,
        resume=resume,
        record=record,
        evaluations=_evaluations(perplexity, blimp, limit=limit),
        report_to=report_to or (),
    )


@app.command(
    epilog="Example:\n\n  python -m probes.relora sweep micro --output ranks --set lora_rank=4,8,16"
    " --seeds 0,1,2"
)
def sweep(
    preset: PresetArgument,
    output: Annotated[Path, typer.Option("--output", help="The folder of the sweep.")],
    method: Annotated[
        str,
        typer.Option(
            "--methods",
            "--method",
            help="Methods, as in full_rank,relora,relora:as_published; or all.",
        ),
    ] = "relora",
    text: TextOption = None,
    data: DataOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, as in 0,1,2.")] = "0",
    steps: StepsOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value; field=value,value,... varies the field."),
    ] = None,
    published: PublishedOption = False,
    match: Annotated[
        str,
        typer.Option("--match", help="What all runs share: steps, tokens or trainable_parameters."),
    ] = "steps",
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Runs that train at the same time.")
    ] = 1,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="Kinds to compare, as in weight,update.")
    ] = None,
) -> None:
    """Train all combinations of settings and compare them. Repeat it to continue."""
    from dynamics.errors import DynamicsError
    from probes.relora.sweep import run_sweep
    from probes.relora.sweep_plan import plan

    goes_on("Stopped. The same command goes on with the runs that are not done.")
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        raise DynamicsError(f"--seeds takes numbers, as in 0,1,2; found {seeds!r}.")
    runs = plan(
        preset,
        methods=method.split(","),
        words=settings or [],
        seeds=[int(seed) for seed in seeds.split(",")],
        given={"max_steps": steps, **_source(text, data)},
        published=published,
        match=match,
    )
    wanted = None if kinds is None else kinds.split(",")
    run_sweep(runs, preset, output, text=text, workers=workers, kinds=wanted)


@app.command(
    epilog="Examples:\n\n  python -m probes.relora evaluate runs/relora --blimp blimp "
    "--download-blimp\n\n  python -m probes.relora evaluate runs/relora --text paloma --limit 100"
)
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, models or adapters.")],
    blimp: Annotated[
        Path | None, typer.Option("--blimp", help="Folder of BLiMP's .jsonl files.")
    ] = None,
    download_blimp: Annotated[
        bool, typer.Option("--download-blimp", help="Fetch the BLiMP files that are missing.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="Texts: files or folders (jsonl, jsonl.gz, parquet, txt), or datasets."
        ),
    ] = None,
    domain_field: Annotated[
        str | None, typer.Option("--domain-field", help="The field that names a text's domain.")
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="The loss on the held-out sequences of the run.")
    ] = False,
    trained_on: Annotated[
        Path | None,
        typer.Option("--trained-on", help="The --text folder that they were trained on."),
    ] = None,
    limit: LimitOption = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", help="Steps of checkpoints, as in 80,160; all by default."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="Name or path of a tokenizer, if a run has none."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Name or path of the model that adapters belong to."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, ... Default: a GPU if there is one.")
    ] = None,
) -> None:
    """Evaluate checkpoints on BLiMP, texts and held-out data. Repeat it for new ones."""
    from dynamics.cli.output import print_table
    from dynamics.errors import DynamicsError
    from probes.relora.evaluation.blimp_data import download_blimp as download
    from probes.relora.evaluation.evaluate import evaluate as evaluate_run
    from probes.relora.evaluation.evaluate import validation_loss
    from probes.relora.evaluation.tables import evaluation_tables

    goes_on("Stopped. The same command goes on with the checkpoints that are not evaluated.")
    if steps is not None and not all(step.strip().isdecimal() for step in steps.split(",")):
        raise DynamicsError(f"--steps takes numbers, as in 80,160; found {steps!r}.")
    if blimp is not None and download_blimp:
        download(blimp)
    given = _evaluations(text, blimp, domain_field=domain_field, limit=limit)
    if not given and not validation:
        raise DynamicsError("Nothing to evaluate; give --blimp, --text or --validation.")
    for run in runs:
        if len(runs) > 1:
            print(run)
        own = [validation_loss(run, trained_on)] if validation else []
        evaluated = evaluate_run(
            run,
            [*own, *given],
            steps=None if steps is None else [int(step) for step in steps.split(",")],
            tokenizer=tokenizer,
            base=base,
            device=device,
        )
        for table in evaluation_tables(evaluated):
            print_table(table)
        print(f"Wrote {run / 'evaluation.jsonl'}")


def _evaluations(
    text: list[str] | None,
    blimp: Path | None,
    *,
    domain_field: str | None = None,
    limit: int | None = None,
) -> "list[Evaluation]":
    """The evaluations on texts and on BLiMP that a command line asks for."""
    from probes.relora.evaluation.blimp_data import missing_paradigms, read_blimp
    from probes.relora.evaluation.evaluations import BlimpEvaluation, PerplexityEvaluation
    from probes.relora.evaluation.texts import read_texts

    evaluations: list[Evaluation] = []
    if text:
        texts = read_texts(text, domain_field=domain_field, limit=limit)
        evaluations.append(PerplexityEvaluation(texts))
    if blimp is not None:
        paradigms = read_blimp(blimp, limit=limit)
        if missing := missing_paradigms(paradigms):
            print(f"{blimp} lacks {len(missing)} of the 67 paradigms of BLiMP: {missing}")
        evaluations.append(BlimpEvaluation(paradigms))
    return evaluations


def _source(text: Path | None, data: str | None) -> dict[str, str | None]:
    """The config fields for the data: a text has no dataset, and trains its own tokenizer."""
    from dynamics.errors import DynamicsError

    if text is None:
        return {"dataset": data}
    if data is not None:
        raise DynamicsError("A run trains on --text or on --data; give one of them.")
    return {"dataset": "none", "tokenizer": "none"}


if __name__ == "__main__":
    run_app(app)
