"""Spectra in a recording: two arrays per kind, with one row per matrix in each record.

A third array is there for differences: their noise floor without the roundings of training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.errors import FormatError
from dynamics.recordings import paths, stores
from dynamics.recordings.reader import Recording
from dynamics.runs.run import Spectrum

MATRICES = "matrices"


def spectra_arrays(
    kind: str, matrices: Sequence[Mapping[str, Any]], spectra: Mapping[str, Spectrum]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(Path -> array, attributes of both arrays) for the spectra of one kind in one record.

    Args:
        kind: of `schema.KINDS`.
        matrices: JSON-like facts of all matrices, the same in every record: name, rows, cols, ...
        spectra: name -> spectrum; a record may lack some.
    """
    width = max(min(each["rows"], each["cols"]) for each in matrices)
    values = np.full((len(matrices), width), np.nan)
    bounds = np.full((len(matrices), 3), np.nan)
    storage = np.full((len(matrices), 1), np.nan)
    for row, each in enumerate(matrices):
        if (spectrum := spectra.get(each["name"])) is not None:
            values[row, : spectrum.s.size] = spectrum.s
            bounds[row] = spectrum.error, spectrum.noise_floor, spectrum.rank_bound
            storage[row] = spectrum.noise_floor
            if spectrum.storage_noise_floor is not None:
                storage[row] = spectrum.storage_noise_floor
    arrays = {
        paths.spectra_path(kind, paths.SINGULAR_VALUE): values,
        paths.spectra_path(kind, paths.BOUNDS): bounds,
    }
    if kind in schema.DIFFERENCES:
        arrays[paths.spectra_path(kind, paths.STORAGE_NOISE)] = storage
    return arrays, {MATRICES: [dict(each) for each in matrices]}


class SpectraReader:
    """The spectra of a recording.

    Attributes:
        shapes: kind -> name -> (rows, cols).

    Raises:
        FormatError: the attributes that name the matrices are damaged.
    """

    def __init__(self, recording: Recording):
        self._recording = recording
        self.shapes: dict[str, dict[str, tuple[int, int]]] = {}
        for kind in schema.KINDS:
            path = paths.spectra_path(kind, paths.SINGULAR_VALUE)
            if path not in recording.paths:
                continue
            with stores.reporting_damage(path, recording.store):
                listed = recording.attr(path, MATRICES, list)
                self.shapes[kind] = {m["name"]: (int(m["rows"]), int(m["cols"])) for m in listed}
                rows, width = recording.array(path).shape[1:]
                widest = max(min(shape) for shape in self.shapes[kind].values())
                if (rows, width) != (len(listed), widest) or len(self.shapes[kind]) != rows:
                    raise FormatError(
                        f"{path} of {stores.store_name(recording.store)} has {rows} spectra of up "
                        f"to {width} values, but names {len(listed)} of up to {widest}; its "
                        "metadata are damaged."
                    )
        self._rows = {
            kind: {n: i for i, n in enumerate(names)} for kind, names in self.shapes.items()
        }
        self._arrays: dict[tuple[str, int], tuple[np.ndarray | None, ...]] = {}

    def read(self, name: str, index: int, kind: str) -> Spectrum | None:
        """The spectrum of a matrix in record `index`; None where the record has none.

        Raises:
            FormatError: a chunk is damaged.
        """
        if name not in self._rows.get(kind, {}):
            return None
        if (kind, index) not in self._arrays:
            # Kept, as an analysis goes matrix by matrix. Its result holds as many numbers anyway.
            self._arrays[kind, index] = tuple(
                self._recording.read(paths.spectra_path(kind, array), index)
                for array in (paths.SINGULAR_VALUE, paths.BOUNDS, paths.STORAGE_NOISE)
            )
        values, bounds, storage = self._arrays[kind, index]
        if values is None or bounds is None:
            return None
        row, (rows, cols) = self._rows[kind][name], self.shapes[kind][name]
        error, noise_floor, bound = bounds[row].tolist()
        if np.isnan(bound):
            return None
        s = values[row, : min(rows, cols)]
        of_storage = None if storage is None else float(storage[row, 0])
        return Spectrum(s, rows, cols, int(bound), error, noise_floor, of_storage)
