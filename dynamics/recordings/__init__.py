"""The recording: one Zarr v3 store per run, appended record by record, read at any time.

Only the files of this package spell its paths; `paths` describes the layout.
"""

from dynamics.recordings.compression import COMPRESSIONS, Compression
from dynamics.recordings.paths import ADAPTER, GRADIENT, SPECTRA, WEIGHT, factor_path, matrix_path
from dynamics.recordings.reader import Recording
from dynamics.recordings.spectra import SpectraReader, spectra_arrays
from dynamics.recordings.stores import StoreLike, told
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
    "told",
    "verify",
]
