"""What a run's folder holds: how it was started, and which checkpoints are whole."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from dynamics.errors import DynamicsError, MissingError, OutputExistsError
from probes.relora.config import TrainConfig
from probes.relora.data.text import TrainingData
from probes.relora.training import base_checkpoint

CONFIG_NAME = "train_config.json"
TOKENIZER_NAME = "tokenizer.json"
RECORDING_NAME = "run.zarr"
_DIGEST = "train_tokens_sha256"


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that was written to its end, None where there is none.

    The Trainer writes trainer_state.json last, and for ReLoRA the base weights follow it.
    """
    complete = complete_checkpoints(output_dir)
    return complete[-1] if complete else None


def complete_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Every checkpoint-N that was written to its end, in order."""
    return [path for path in checkpoints_in(Path(output_dir)) if _is_complete(path)]


def run_identity(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """What a run is, in JSON's types."""
    return _in_json({**dataclasses.asdict(config), _DIGEST: data.train.digest()})


def is_finished(output_dir: str | os.PathLike[str], config: TrainConfig) -> bool:
    """Whether the folder holds this run, trained to its end.

    Raises:
        DynamicsError: it holds another run.
    """
    output = Path(output_dir)
    if not (output / CONFIG_NAME).is_file():
        return False
    check_identity(output, _in_json(dataclasses.asdict(config)))
    newest = newest_checkpoint(output)
    return newest is not None and step_of(newest) >= config.max_steps


def step_of(checkpoint: Path) -> int:
    """The optimizer steps done when a folder checkpoint-N was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(output: Path) -> list[Path]:
    """Every checkpoint-N, whole or not, in order."""
    found = [path for path in output.glob("checkpoint-*") if re.search(r"-\d+$", path.name)]
    return sorted(found, key=step_of)


def refuse_checkpoints(output: Path) -> None:
    """Raises OutputExistsError where there is any checkpoint."""
    if present := checkpoints_in(output):
        raise OutputExistsError(
            f"{output} holds {len(present)} checkpoints, the last of step {step_of(present[-1])}; "
            "resume it, or choose another folder."
        )


def checkpoint_to_resume(output: Path, identity: dict[str, Any]) -> Path:
    """The newest complete checkpoint of an unfinished run of this identity.

    Raises:
        MissingError: there is none.
        DynamicsError: the run is finished, or was started otherwise.
    """
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        raise MissingError(f"No complete checkpoint in {output}; start it without resume.")
    if step_of(checkpoint) >= identity["max_steps"]:
        raise DynamicsError(
            f"{output} is trained to its end, step {step_of(checkpoint)} of "
            f"{identity['max_steps']}; there is nothing to resume."
        )
    check_identity(output, identity)
    return checkpoint


def check_identity(output: Path, identity: dict[str, Any]) -> None:
    """Raises MissingError or DynamicsError unless `output` was started with this identity."""
    path = output / CONFIG_NAME
    if not path.is_file():
        raise MissingError(f"No {path}; it cannot be told how the run to resume was started.")
    started = json.loads(path.read_text())
    for name in identity:
        if started.get(name) != identity[name]:
            raise DynamicsError(
                f"{output} was started with {name} = {started.get(name)!r}, "
                f"not {identity[name]!r}; resume it as it was started."
            )


def _in_json(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    base = checkpoint / base_checkpoint.FOLDER / base_checkpoint.WEIGHTS_NAME
    return base.is_file() or not (checkpoint / "adapter_config.json").is_file()
