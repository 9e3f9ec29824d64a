"""evaluation.jsonl: what was evaluated on a run's checkpoints, beside them.

One line per checkpoint and evaluation: {"step": 100, "key": ..., "scalars": {name: value}}. The key
stands for what it was evaluated on and how, so that a series never mixes two ways.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynamics.errors import FormatError
from dynamics.formats.storage.files import contained

EVALUATIONS = "evaluation.jsonl"


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, in order; empty where there is none.

    A last line without its end is what a killed writer left, and no line.

    Raises:
        FormatError: a line is damaged.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            sound = isinstance(row["step"], int) and isinstance(row["scalars"], dict)
        except (ValueError, TypeError, KeyError):
            sound = False
        if not sound:
            raise FormatError(f"Line {number} of {path} is damaged; remove it.")
        found.append(row)
    return found


def evaluated_scalars(rows: list[dict[str, Any]], steps: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> series along `steps`, float64, NaN where nothing was evaluated.

    Of several ways in which a name was evaluated, the last one in the file.
    """
    last = {name: row.get("key") for row in rows for name in row["scalars"]}
    series = {name: np.full(len(steps), np.nan) for name in last}
    for row in rows:
        for name, value in row["scalars"].items():
            if row.get("key") == last[name] and isinstance(value, int | float):
                series[name][steps == row["step"]] = value
    return series


def with_evaluations(
    logged: Mapping[str, np.ndarray], folder: Path, root: Path, steps: np.ndarray
) -> dict[str, np.ndarray]:
    """Logged series, and those of a folder's evaluation.jsonl, which go before logged ones.

    Raises:
        FormatError: the file is damaged, or a link that leads out of `root`.
    """
    rows = read_evaluations(contained(folder / EVALUATIONS, root))
    return {**logged, **evaluated_scalars(rows, steps)}
