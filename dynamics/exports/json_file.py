"""JSON as a Table Schema (frictionless): fields with titles and units, and a list of rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def write_json(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as JSON. JSON knows neither NaN nor Inf: both are null."""
    fields = [
        {"name": name, "type": _type(frame[name])} | _described(frame, str(name)) for name in frame
    ]
    columns = {name: _plain(frame[name]) for name in frame}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    content = {
        "schema": {"fields": fields, "pandas_version": "1.4.0"},  # the version of this layout
        "result": frame.attrs["result"],
        "data": rows,
    }
    path.write_text(json.dumps(content, allow_nan=False, ensure_ascii=False), encoding="utf-8")


def _described(frame: pd.DataFrame, name: str) -> dict[str, Any]:
    known = frame.attrs["columns"].get(name, {})
    words = {"long_name": "title", "units": "unit", "reference": "reference"}
    found = {words[each]: known[each] for each in words if known.get(each)}
    if pd.api.types.is_extension_array_dtype(frame[name].dtype) and _type(frame[name]) == "integer":
        found["extDtype"] = str(frame[name].dtype)  # for pandas: integers that may be missing
    return found


def _type(values: pd.Series) -> str:
    if isinstance(values.dtype, pd.CategoricalDtype):
        return "string"
    if pd.api.types.is_bool_dtype(values):
        return "boolean"
    if pd.api.types.is_integer_dtype(values):
        return "integer"
    # Lists are "any": pandas knows no "array".
    return "number" if pd.api.types.is_float_dtype(values) else "any"


def _plain(values: pd.Series) -> list[Any]:
    if _type(values) == "any":
        return [None if each is None else _finite(each) for each in values]
    if _type(values) == "number":
        return _finite(values.to_numpy())
    return [None if pd.isna(each) else each for each in values.astype(object)]


def _finite(numbers: np.ndarray) -> list[float | None]:
    # Of the shortest text that stands for the stored number, also where that is a float32.
    return [float(str(each)) if np.isfinite(each) else None for each in numbers]
