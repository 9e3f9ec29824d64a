"""CSV: numbers with all their digits, empty where there is none; no units."""

import json
from pathlib import Path

import pandas as pd

from dynamics import schema


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as CSV; compressed where the name ends so (.csv.gz)."""
    if schema.SINGULAR_VALUE in frame:
        texts = [
            None if s is None else json.dumps(s.tolist()) for s in frame[schema.SINGULAR_VALUE]
        ]
        frame = frame.copy(deep=False)
        frame[schema.SINGULAR_VALUE] = texts
    frame.to_csv(path, index=False)
