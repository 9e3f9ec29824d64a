"""The recording: one Zarr v3 store per run, appended record by record, read at any time.

Only the files of this package spell its paths; `paths` describes the layout.
"""

from dynamics.layout.compression import COMPRESSIONS, Compression
from dynamics.layout.paths import ADAPTER, GRADIENT, SPECTRA, WEIGHT, factor_path, matrix_path
from dynamics.layout.reader import Recording
from dynamics.layout.spectra import SpectraReader, spectra_arrays
from dynamics.layout.stores import StoreLike, told
from dynamics.layout.transactions import is_repository, is_repository_folder
from dynamics.layout.verification import Verification, verify
from dynamics.layout.writer import RecordingWriter

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
