"""The folder of a run: how the run was started, and which checkpoints are complete."""

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
    """The newest complete checkpoint; None where there is none.

    The Trainer writes trainer_state.json last; for ReLoRA, the base weights follow it.

    Args:
        output_dir: the folder of a run, with checkpoint-N/.

    Example:
        >>> from probes.relora import newest_checkpoint
        >>> print(newest_checkpoint("no/such/run"))
        None
    """
    complete = complete_checkpoints(output_dir)
    return complete[-1] if complete else None


def complete_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Every complete checkpoint-N, in order of N."""
    return [path for path in checkpoints_in(Path(output_dir)) if _is_complete(path)]


def run_identity(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """What identifies a run: its config and a digest of its data, in JSON types."""
    return _in_json({**dataclasses.asdict(config), _DIGEST: data.train.digest()})


def is_finished(output_dir: str | os.PathLike[str], config: TrainConfig) -> bool:
    """Whether the folder holds this run, trained to its end.

    Raises:
        DynamicsError: the folder holds another run.
    """
    output = Path(output_dir)
    if not (output / CONFIG_NAME).is_file():
        return False
    check_identity(output, _in_json(dataclasses.asdict(config)))
    newest = newest_checkpoint(output)
    return newest is not None and step_of(newest) >= config.max_steps


def step_of(checkpoint: Path) -> int:
    """N of a folder checkpoint-N: the optimizer steps done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(output: Path) -> list[Path]:
    """Every checkpoint-N, complete or not, in order of N."""
    paths = [path for path in output.glob("checkpoint-*") if re.search(r"-\d+$", path.name)]
    return sorted(paths, key=step_of)


def refuse_checkpoints(output: Path) -> None:
    """Raise OutputExistsError if there is any checkpoint."""
    if present := checkpoints_in(output):
        raise OutputExistsError(
            f"{output} holds {len(present)} checkpoints, the last of step {step_of(present[-1])}; "
            "resume it, or choose another folder."
        )


def checkpoint_to_resume(output: Path, identity: dict[str, Any]) -> Path:
    """The newest complete checkpoint of an unfinished run that has this identity.

    Raises:
        MissingError: there is none.
        DynamicsError: the run is finished, or was started with another identity.
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
    """Raise MissingError or DynamicsError unless `output` was started with this identity."""
    path = output / CONFIG_NAME
    if not path.is_file():
        raise MissingError(
            f"No {path}, which says how the run was started; put it back, or start a new run."
        )
    started = read_identity(path)
    for name in identity:
        if started.get(name) != identity[name]:
            raise DynamicsError(
                f"{output} was started with {name} = {started.get(name)!r}, "
                f"not {identity[name]!r}; resume it as it was started."
            )


def read_identity(path: Path) -> dict[str, Any]:
    """What `run_identity` gave when a run was started; newer fields have their defaults."""
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    return {**_in_json(defaults), **json.loads(path.read_text())}


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
