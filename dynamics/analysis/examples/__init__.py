"""load_example(): results of real runs that come with the package, for trying things out."""

import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import xarray as xr

from dynamics.analysis.storage import load
from dynamics.errors import MissingError, near

EXAMPLES: dict[str, str] = {
    "relora_micro": "full rank, ReLoRA, ReLoRA as published and LoRA at the size micro, compared",
    "low_rank_micro": "full rank and eight low-rank methods and optimizers at the size micro",
}


def load_example(name: str) -> xr.Dataset:
    """Load a comparison that comes with the package, into memory.

    Args:
        name: "relora_micro", the reference experiment that docs/relora_results.md reports: three
            seeds of each method along `run`, with the coordinates `method`, `seed` and
            `trainable_parameters`. "low_rank_micro", the nine methods of docs/results.md: also
            where their gradients point (`gradient_...`, see `gradient_subspaces`), how far weights
            are from earlier ones (`intruder_...`, see `intruders`, since step 280) and from those
            of the full-rank twin (`twin_...`, see `run_alignment`).

    Returns:
        The Dataset, as `compare` returns it.

    Raises:
        MissingError: there is no example of this name.

    Example:
        >>> micro = dy.load_example("relora_micro")
        >>> sorted(set(micro["method"].values.tolist()))
        ['full_rank', 'lora', 'relora', 'relora:as_published']
    """
    if name not in EXAMPLES:
        raise MissingError(
            f"No example {name!r}{near(name, EXAMPLES)}; known: {', '.join(EXAMPLES)}."
        )
    with (
        as_file(files("dynamics.analysis.examples") / f"{name}.zip") as archive,
        tempfile.TemporaryDirectory() as folder,
    ):
        shutil.unpack_archive(archive, folder)
        return load(Path(folder) / f"{name}.zarr")
