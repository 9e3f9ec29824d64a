"""evaluation.jsonl: results of evaluating a run's checkpoints; the file lies beside them.

One line per checkpoint and evaluation: {"step": 100, "key": ..., "scalars": {name: value}}. The key
identifies the data and the method of the evaluation, so that a series never mixes two of them.
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
    """The lines of a file, in order; empty where there is no file.

    A last line without line break is skipped: a writer was killed while it wrote the line.

    Raises:
        FormatError: a line is damaged.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            sound = isinstance(row["step"], int) and isinstance(row["scalars"], dict)
        except (ValueError, TypeError, KeyError):
            sound = False
        if not sound:
            raise FormatError(f"Line {number} of {path} is damaged; remove the line.")
        rows.append(row)
    return rows


def evaluated_scalars(rows: list[dict[str, Any]], steps: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> (steps,) float64 series, NaN where nothing was evaluated.

    Where a name was evaluated under several keys, the last key in the file counts.
    """
    last_key = {name: row.get("key") for row in rows for name in row["scalars"]}
    series = {name: np.full(len(steps), np.nan) for name in last_key}
    for row in rows:
        for name, value in row["scalars"].items():
            if row.get("key") == last_key[name] and isinstance(value, int | float):
                series[name][steps == row["step"]] = value
    return series


def with_evaluations(
    logged: Mapping[str, np.ndarray], folder: Path, root: Path, steps: np.ndarray
) -> dict[str, np.ndarray]:
    """The logged series, and those of a folder's evaluation.jsonl, which replace logged ones.

    Raises:
        FormatError: the file is damaged, or a link that leads out of `root`.
    """
    rows = read_evaluations(contained(folder / EVALUATIONS, root))
    return {**logged, **evaluated_scalars(rows, steps)}
