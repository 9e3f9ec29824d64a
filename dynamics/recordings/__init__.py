"""Recordings: one Zarr v3 store per run, appended record by record, readable at any time.

Only the files of this package know the paths in a store; `paths` describes the layout.
"""

from dynamics.recordings.beginnings import existing_recording
from dynamics.recordings.compression import COMPRESSIONS, Compression
from dynamics.recordings.numbered import (
    can_be_numbered,
    existing_numbers,
    name_of,
    numbered,
    recording_to_continue,
)
from dynamics.recordings.paths import (
    ADAPTER,
    BASE,
    GRADIENT,
    SPARSE_ENTRIES,
    SPECTRA,
    WEIGHT,
    decoded,
    factor_path,
    matrix_path,
)
from dynamics.recordings.reader import Recording
from dynamics.recordings.spectra import SpectraReader, spectra_arrays
from dynamics.recordings.stores import StoreLike, absolute, for_writing, store_name
from dynamics.recordings.transactions import is_repository, is_repository_folder
from dynamics.recordings.verification import Verification, verify
from dynamics.recordings.writer import RecordingWriter

__all__ = [
    "ADAPTER",
    "BASE",
    "COMPRESSIONS",
    "GRADIENT",
    "SPARSE_ENTRIES",
    "SPECTRA",
    "WEIGHT",
    "Compression",
    "Recording",
    "RecordingWriter",
    "SpectraReader",
    "StoreLike",
    "Verification",
    "absolute",
    "can_be_numbered",
    "decoded",
    "existing_numbers",
    "existing_recording",
    "factor_path",
    "for_writing",
    "is_repository",
    "is_repository_folder",
    "matrix_path",
    "name_of",
    "numbered",
    "recording_to_continue",
    "spectra_arrays",
    "store_name",
    "verify",
]
