"""The command line of the ReLoRA experiment: python -m probes.relora."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamics.cli.app import run_app

if TYPE_CHECKING:
    from probes.relora.evaluation.evaluations import Evaluation

LimitOption = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="First pairs of a paradigm, texts of a domain."),
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def relora() -> None:
    """ReLoRA against full-rank pretraining of small language models."""


@app.command(epilog="Example:\n\n  python -m probes.relora demo demo --text folder/with/txt/files")
def demo(
    output: Annotated[Path, typer.Argument(help="A new folder for everything it writes.")] = Path(
        "demo"
    ),
    text: Annotated[
        Path | None,
        typer.Option("--text", help="Folder of .txt files; this Python's own sources by default."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Train a full-rank and a ReLoRA twin, measure both, compare them, draw figures."""
    from probes.relora.demo import demo_config, run_demo

    run_demo(output, demo_config(seed), text=text)


@app.command(
    epilog="Examples:\n\n  python -m probes.relora train micro --method relora --output runs/relora"
    "\n\n  python -m probes.relora train micro --method full_rank --output runs/full_rank"
)
def train(
    preset: Annotated[str, typer.Argument(help="tiny, small (as published) or micro.")],
    output: Annotated[Path, typer.Option("--output", help="The run's folder.")],
    method: Annotated[str, typer.Option("--method", help="full_rank, relora or lora.")] = "relora",
    text: Annotated[Path | None, typer.Option("--text", help="Folder of .txt files.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Tokens: a Hugging Face dataset, or parquet or Arrow."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="field=value, any field of TrainConfig.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--as-published", help="With the published code's defects.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where it was interrupted.")
    ] = False,
    record: Annotated[bool, typer.Option("--record/--no-record")] = True,
    blimp: Annotated[
        Path | None, typer.Option("--blimp", help="Evaluate on BLiMP's .jsonl files, as it trains.")
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", help="Evaluate on texts too, as --text of evaluate."),
    ] = None,
    limit: LimitOption = None,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", help="tensorboard, wandb, trackio, ...")
    ] = None,
) -> None:
    """Train one run of the reference experiment, recorded into OUTPUT/run.zarr."""
    from probes.relora.experiment import run_experiment
    from probes.relora.settings import configured

    config = configured(
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
    preset: Annotated[str, typer.Argument(help="tiny, small (as published) or micro.")],
    output: Annotated[Path, typer.Option("--output", help="A folder for all runs.")],
    method: Annotated[
        str, typer.Option("--method", help="One, or several: a,b; relora:as_published is one too.")
    ] = "relora",
    text: Annotated[Path | None, typer.Option("--text", help="Folder of .txt files.")] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Tokens: a Hugging Face dataset, or parquet or Arrow."),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="0,1,2")] = "0",
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="field=value, or field=value,value,...")
    ] = None,
    published: Annotated[
        bool, typer.Option("--as-published", help="With the published code's defects.")
    ] = False,
    match: Annotated[
        str, typer.Option("--match", help="steps, tokens or trainable_parameters.")
    ] = "steps",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs at a time.")] = 1,
    kinds: Annotated[
        str | None, typer.Option("--kinds", help="Kinds to compare, e.g. weight,update.")
    ] = None,
) -> None:
    """Train all combinations of some settings and compare them; again: goes on."""
    from dynamics.errors import DynamicsError
    from probes.relora.sweep import run_sweep
    from probes.relora.sweep_plan import plan

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
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, with checkpoint-N/.")],
    blimp: Annotated[
        Path | None, typer.Option("--blimp", help="Folder of BLiMP's .jsonl files.")
    ] = None,
    download_blimp: Annotated[
        bool, typer.Option("--download-blimp", help="Fetch those that are not in it.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="Files or a folder (jsonl, jsonl.gz, parquet, txt) or a dataset's name."
        ),
    ] = None,
    domain_field: Annotated[
        str | None, typer.Option("--domain-field", help="The field that names a text's domain.")
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="The loss on what a run held out.")
    ] = False,
    trained_on: Annotated[
        Path | None, typer.Option("--trained-on", help="The --text folder they were trained on.")
    ] = None,
    limit: LimitOption = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Checkpoints, as in 80,160; all by default.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Name or path, where a run has none.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
) -> None:
    """Evaluate checkpoints on BLiMP, texts and held-out data; again: what is new."""
    from rich.console import Console

    from dynamics.errors import DynamicsError
    from probes.relora.evaluation.blimp_data import download_blimp as download
    from probes.relora.evaluation.evaluate import evaluate as evaluate_run
    from probes.relora.evaluation.evaluate import validation_loss
    from probes.relora.evaluation.tables import evaluation_tables

    if steps is not None and not all(step.strip().isdecimal() for step in steps.split(",")):
        raise DynamicsError(f"--steps takes numbers, as in 80,160; found {steps!r}.")
    if blimp is not None and download_blimp:
        download(blimp)
    given = _evaluations(text, blimp, domain_field=domain_field, limit=limit)
    if not given and not validation:
        raise DynamicsError("Nothing to evaluate: give --blimp, --text or --validation.")
    for run in runs:
        if len(runs) > 1:
            print(run)
        own = [validation_loss(run, trained_on)] if validation else []
        found = evaluate_run(
            run,
            [*own, *given],
            steps=None if steps is None else [int(step) for step in steps.split(",")],
            tokenizer=tokenizer,
            device=device,
        )
        for table in evaluation_tables(found):
            Console().print(table)
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
            print(f"{len(missing)} of BLiMP's 67 paradigms are not in {blimp}: {missing}")
        evaluations.append(BlimpEvaluation(paradigms))
    return evaluations


def _source(text: Path | None, data: str | None) -> dict[str, str | None]:
    """The fields of a run that say what it trains on; a text is neither, and has its tokenizer."""
    from dynamics.errors import DynamicsError

    if text is None:
        return {"dataset": data}
    if data is not None:
        raise DynamicsError("A run trains on --text or on --data; give one of them.")
    return {"dataset": "none", "tokenizer": "none"}


if __name__ == "__main__":
    run_app(app)
