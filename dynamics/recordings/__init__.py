"""Recordings: one Zarr v3 store per run, appended record by record, readable at any time.

Only the files of this package know the paths in a store; `paths` describes the layout.
"""

from dynamics.recordings.compression import COMPRESSIONS, Compression
from dynamics.recordings.paths import ADAPTER, GRADIENT, SPECTRA, WEIGHT, factor_path, matrix_path
from dynamics.recordings.reader import Recording
from dynamics.recordings.spectra import SpectraReader, spectra_arrays
from dynamics.recordings.stores import StoreLike, store_name
from dynamics.recordings.transactions import is_repository, is_repository_folder
from dynamics.recordings.verification import Verification, verify
from dynamics.recordings.writer import RecordingWriter

__all__ = [
    "ADAPTER",
    "COMPRESSIONS",
    "GRADIENT",
    "SPECTRA",
    "WEIGHT",
    "Compression",
    "Recording",
    "RecordingWriter",
    "SpectraReader",
    "StoreLike",
    "Verification",
    "factor_path",
    "is_repository",
    "is_repository_folder",
    "matrix_path",
    "spectra_arrays",
    "store_name",
    "verify",
]
