"""Parquet and Arrow: units and definitions in the fields' metadata, provenance in the schema's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dynamics.errors import require_extra

if TYPE_CHECKING:
    import pyarrow

METADATA = b"learning-dynamics"


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet.

    Raises:
        DynamicsError: pyarrow is not installed.
    """
    table = arrow_table(frame)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, compression="zstd")


def write_arrow(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as an Arrow IPC file, which is Feather 2.

    Raises:
        DynamicsError: pyarrow is not installed.
    """
    table = arrow_table(frame)
    import pyarrow.feather

    pyarrow.feather.write_feather(table, path, compression="zstd")


def arrow_table(frame: pd.DataFrame) -> "pyarrow.Table":
    """A table of Arrow. A field's metadata has long_name, units and reference.

    The metadata of the schema has the attributes of the result as JSON, under "learning-dynamics".
    pandas finds the frame's `attrs` again.

    Raises:
        DynamicsError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise require_extra("exports", error) from error
    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    columns = frame.attrs["columns"]
    fields = [
        field.with_metadata({name: str(value) for name, value in columns[field.name].items()})
        if field.name in columns
        else field
        for field in table.schema
    ]
    metadata = {
        **(table.schema.metadata or {}),
        METADATA: json.dumps(frame.attrs["result"]),
        b"PANDAS_ATTRS": json.dumps(frame.attrs),
    }
    return table.cast(pyarrow.schema(fields, metadata=metadata))
