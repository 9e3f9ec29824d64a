"""trainer_state.json: what the Hugging Face Trainer logged up to a checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.storage.files import read_json

STATE = "trainer_state.json"
# Bookkeeping of the Trainer, not of the model.
_LEFT_OUT = {"step", "total_flos"}


def read_state(path: Path) -> Mapping[str, Any]:
    """The state; empty where there is none.

    Raises:
        FormatError: it is damaged.
    """
    if not path.is_file():
        return {}
    state = read_json(path)
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(each, dict) for each in history):
        raise FormatError(f"{path} has a log_history of {type(history).__name__}, expected a list.")
    return state


def last_logged(state: Mapping[str, Any], step: int | None) -> dict[str, float]:
    """Name -> the last value that was logged at a step not after `step`, as far as it is a number.

    The Trainer's `loss` is a mean over the steps since it was logged before. `tokens` is
    `num_input_tokens_seen`, where it was counted.
    """
    found: dict[str, float] = {}
    for entry in state.get("log_history", []):
        at = entry.get("step")
        if step is not None and (not isinstance(at, int | float) or at > step):
            continue
        for name, value in entry.items():
            if name not in _LEFT_OUT and _is_number(value):
                found[name] = float(value)
    tokens = state.get("num_input_tokens_seen")
    if _is_number(tokens) and tokens:
        found["tokens"] = float(tokens)
    return found


def global_step(state: Mapping[str, Any]) -> int | None:
    """The optimizer steps that were done; None where the state does not tell."""
    step = state.get("global_step")
    sound = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**63
    return step if sound else None


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not math.isnan(value) and abs(value) < 2**1000  # beyond, an int is no float
