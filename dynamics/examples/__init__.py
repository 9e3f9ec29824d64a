"""load_example(): results of real runs, kept in the package to try things on."""

import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import xarray as xr

from dynamics.analysis.storage import load
from dynamics.errors import MissingError

EXAMPLES: dict[str, str] = {
    "relora_micro": "full rank, ReLoRA, ReLoRA as published and LoRA at the size micro, compared",
}


def load_example(name: str) -> xr.Dataset:
    """A comparison that comes with the package, in memory.

    relora_micro: the reference experiment as docs/results.md reports it, several seeds of each
    method along `run`, with the coordinates `method`, `seed` and `trainable_parameters`.

    Raises:
        MissingError: there is no such example.
    """
    if name not in EXAMPLES:
        raise MissingError(f"No example {name!r}; known: {', '.join(EXAMPLES)}.")
    with (
        as_file(files("dynamics.examples") / f"{name}.zip") as archive,
        tempfile.TemporaryDirectory() as folder,
    ):
        shutil.unpack_archive(archive, folder)
        return load(Path(folder) / f"{name}.zarr")
