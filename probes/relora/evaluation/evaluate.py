"""Evaluation of the checkpoints of a run; the results are kept in its evaluation.jsonl."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynamics.errors import DynamicsError, FormatError, MissingError
from dynamics.formats import open_run
from dynamics.formats.shared.evaluations import EVALUATIONS, read_evaluations
from probes.relora.evaluation.evaluations import Evaluation, ValidationLoss
from probes.relora.evaluation.trained_models import (
    ADAPTER_CONFIG,
    load_model,
    load_tokenizer,
    weights_digest,
)
from probes.relora.experiment import read_config_and_data
from probes.relora.training.run_directory import complete_checkpoints, step_of


@dataclass(frozen=True)
class Evaluated:
    """One line of evaluation.jsonl: one evaluation of one checkpoint.

    Attributes:
        step: of the checkpoint.
        key: on what it was evaluated, see `Evaluation.key`.
        weights: which weights were evaluated, see `weights_digest`.
        scalars: name -> value.
        details: see `Result`.
    """

    step: int
    key: str
    weights: str
    scalars: dict[str, float]
    details: dict[str, Any]


def evaluate(
    run_dir: str | os.PathLike[str],
    evaluations: Sequence[Evaluation],
    *,
    steps: Sequence[int] | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Evaluated]:
    """Evaluate a model, an adapter, or the checkpoints of a run.

    New results are appended to `evaluation.jsonl` in its folder.

    Results that the file already has for the same weights and texts are not computed again. When
    `dynamics.open_run` opens the checkpoints, or a recording in the same folder, these scalars
    appear along the steps, beside the values that the training logged.

    Args:
        run_dir: a folder with checkpoint-N/, of which the complete ones are evaluated; or any
            directory of transformers or PEFT that `dynamics.open_run` reads: one model, one
            adapter, or a series of them.
        evaluations: what to evaluate.
        steps: the steps of the checkpoints to evaluate; all complete checkpoints by default.
        tokenizer: name or path of a tokenizer, if neither the folder nor its checkpoints have one.
        base: name or path of the model that adapters belong to; by default `base/` beside them, or
            the one that their config names, if it is on this machine.
        device: where to compute; by default a GPU if there is one.
        say: gets one line per checkpoint and evaluation.

    Returns:
        The results, by evaluation and step, whether computed now or earlier.

    Raises:
        MissingError: there is no such checkpoint, or no tokenizer.
        DynamicsError: a checkpoint cannot be evaluated. Results from before are kept.
    """
    run = Path(run_dir)
    checkpoints = _chosen(run, steps)
    texts = any(each.needs_tokenizer for each in evaluations)
    tokens = load_tokenizer(run, tokenizer, *checkpoints.values()) if texts else None
    keys = [each.key(tokens) for each in evaluations]
    path = run / EVALUATIONS
    known = {
        (row["step"], row.get("key"), row.get("weights")): row for row in read_evaluations(path)
    }
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[tuple[int, int], Evaluated] = {}
    for step, checkpoint in checkpoints.items():
        weights, model = weights_digest(checkpoint), None
        for position, (evaluation, key) in enumerate(zip(evaluations, keys, strict=True)):
            if (row := known.get((step, key, weights))) is None:
                model = load_model(checkpoint, target, base) if model is None else model
                result = evaluation(model, tokens)
                done = Evaluated(step, key, weights, result.scalars, result.details)
                _append(path, done)
                first = next(iter(result.scalars))
                say(f"step {step}: {first} {result.scalars[first]:.4g}")
            else:
                done = Evaluated(**row)
            results[position, step] = done
    return [results[each] for each in sorted(results)]


def validation_loss(run_dir: str | os.PathLike[str], text: Path | None = None) -> ValidationLoss:
    """The loss on the sequences that a run of the reference experiment held out.

    Args:
        run_dir: its folder.
        text: the folder of .txt files that it was trained on; None if it was another dataset.

    Raises:
        MissingError: see `read_config_and_data`.
        DynamicsError: see `read_config_and_data`; or no sequence was held out.
    """
    _, data = read_config_and_data(run_dir, text)
    if not len(data.validation):
        raise DynamicsError(f"{run_dir} held no sequences out; evaluate it on texts instead.")
    return ValidationLoss(data.validation)


def _chosen(run: Path, steps: Sequence[int] | None) -> dict[int, Path]:
    checkpoints = {step_of(path): path for path in complete_checkpoints(run)} or _models_in(run)
    if not checkpoints:
        raise MissingError(
            f"No complete checkpoint-N in {run}, and no other model or adapter of transformers or "
            "PEFT; give the folder of one, or of a trained run."
        )
    for step in steps or ():
        if step not in checkpoints:
            raise MissingError(
                f"No complete checkpoint of step {step} in {run}; available: "
                f"{', '.join(map(str, checkpoints))}."
            )
    return {step: checkpoints[step] for step in (steps and sorted(set(steps))) or checkpoints}


def _models_in(run: Path) -> dict[int, Path]:
    """Step -> directory with a config, as `open_run` finds them; none where it finds no run."""
    try:
        places = open_run(run).places
    except FormatError:
        return {}
    found = {step: Path(place) for step, place in places.items()}
    found = {step: each if each.is_dir() else each.parent for step, each in found.items()}
    return {
        step: each
        for step, each in sorted(found.items())
        if (each / "config.json").is_file() or (each / ADAPTER_CONFIG).is_file()
    }


def _append(path: Path, done: Evaluated) -> None:
    with path.open("a+b") as file:
        # Drop the incomplete last line of a process that was killed while writing.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(dataclasses.asdict(done)).encode() + b"\n")
