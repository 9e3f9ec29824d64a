"""trainer_state.json: what the Hugging Face Trainer logged up to a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.steps import step_inside
from dynamics.formats.storage.files import read_json

STATE = "trainer_state.json"
# Numbers about the Trainer, not about the model.
_LEFT_OUT = {"step", "total_flos"}


def read_state(path: Path) -> Mapping[str, Any]:
    """The state; empty where there is no file.

    Raises:
        FormatError: the file is damaged.
    """
    if not path.is_file():
        return {}
    state = read_json(path)
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(each, dict) for each in history):
        raise FormatError(f"{path} has a log_history of {type(history).__name__}, expected a list.")
    return state


def last_logged(state: Mapping[str, Any], step: int | None) -> dict[str, float]:
    """Name -> the last number that was logged at or before `step`; None: at any step.

    The Trainer's `loss` is a mean over the steps since the loss was logged before. `tokens` is
    `num_input_tokens_seen`, where the Trainer counted it.
    """
    logged: dict[str, float] = {}
    for entry in state.get("log_history", []):
        at = entry.get("step")
        if step is not None and (not isinstance(at, int | float) or at > step):
            continue
        for name, value in entry.items():
            if name not in _LEFT_OUT and _is_number(value):
                logged[name] = float(value)
    tokens = state.get("num_input_tokens_seen")
    if _is_number(tokens) and tokens:
        logged["tokens"] = float(tokens)
    return logged


def global_step(state: Mapping[str, Any]) -> int | None:
    """Count of optimizer steps done; None where the state has none."""
    return step_inside(state.get("global_step"))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) and abs(value) < 2**1000  # a larger int fits no float
