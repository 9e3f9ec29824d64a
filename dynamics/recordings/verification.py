"""Check that a recording holds the numbers that were written."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dynamics.errors import FormatError
from dynamics.recordings import paths, stores
from dynamics.recordings.beginnings import leftovers
from dynamics.recordings.reader import Recording


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        damaged: one line for each damaged record, and one where the events cannot be read.
        sound: how many records hold the numbers that were written.
        unchecked: how many records could not be compared: those of version 1 have no checksum.
        leftovers: keys that belong to no commit. A killed writer leaves them, or a writer at work
            is just writing them. They do no harm; resuming the recording deletes them.
    """

    damaged: tuple[str, ...]
    sound: int
    unchecked: int
    leftovers: tuple[str, ...]


def verify(recording: Recording) -> Verification:
    """Read every number of a recording and compare each record with its checksum."""
    damaged: list[str] = []
    series = _series(recording, damaged)
    sound = unchecked = 0
    for index, step in enumerate(recording.steps):
        matrices = _matrices(recording, index)
        try:
            if series is None or series.checksums[index] == paths.NO_CHECKSUM:
                unchecked += 1
                for _ in matrices:  # decodes every chunk, so damaged ones still raise
                    pass
            elif series.checksums[index] == paths.record_checksum(
                int(step), int(series.tokens[index]), series.logged(index), matrices
            ):
                sound += 1
            else:
                damaged.append(
                    f"Record at step {step} of {stores.store_name(recording.store)} is not what "
                    "was written: a matrix or scalar is missing, or comes from another record."
                )
        except FormatError as error:
            damaged.append(f"Record at step {step}: {error}")
    try:
        _ = recording.events
    except FormatError as error:
        damaged.append(f"Events: {error}")
    return Verification(tuple(damaged), sound, unchecked, tuple(_leftovers(recording)))


@dataclass(frozen=True)
class _Series:
    """The numbers of all records besides their matrices."""

    checksums: np.ndarray
    tokens: np.ndarray
    scalars: dict[str, np.ndarray]

    def logged(self, index: int) -> dict[str, float]:
        return {name: float(values[index]) for name, values in self.scalars.items()}


def _series(recording: Recording, damaged: list[str]) -> _Series | None:
    if paths.CHECKSUM not in recording.paths:
        return None
    try:
        return _Series(
            recording.series(paths.CHECKSUM),
            recording.series(paths.TOKENS),
            {name: values for name, values in recording.scalars.items() if name != paths.TOKENS},
        )
    except FormatError as error:
        damaged.append(f"Scalars: {error}")
        return None


def _matrices(recording: Recording, index: int) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(recording.paths):
        values = recording.read(path, index) if paths.is_matrix(path) else None
        if values is not None:
            yield path, values


def _leftovers(recording: Recording) -> list[str]:
    store = recording.array(paths.STEP).store_path.store
    if not store.supports_listing:
        return []
    lengths = {path: recording.array(path).shape[0] for path in recording.paths}
    return leftovers(stores.keys_of(store), lengths)
