"""Spectra that are recorded in place of matrices are read with their bits and their bounds."""

import numpy as np
from zarr.storage import MemoryStore

from dynamics.recordings import Recording, RecordingWriter
from dynamics.recordings.spectra import SpectraReader, spectra_arrays
from dynamics.runs.run import Spectrum

MATRICES = [{"name": "a.weight", "rows": 4, "cols": 3}, {"name": "b.weight", "rows": 2, "cols": 5}]
OF_A = Spectrum(np.array([3.0, 2.0, 1.0]), 4, 3, 3, 1e-15, 1e-3)
OF_B = Spectrum(np.array([5.0, 0.5]), 2, 5, 1, 2e-15, 2e-3)


def recorded(*of_steps):
    """The reader of records 0, 1, ..., each of which has these spectra."""
    store = MemoryStore()
    with RecordingWriter(store, {}) as writer:
        for step, spectra in enumerate(of_steps):
            arrays, attrs = spectra_arrays("weight", MATRICES, spectra)
            writer.append(step, arrays, attrs=dict.fromkeys(arrays, attrs))
    return SpectraReader(Recording(store))


def test_a_spectrum_is_read_with_its_shape_its_error_its_floor_and_its_bound():
    reader = recorded({"a.weight": OF_A, "b.weight": OF_B})
    assert reader.shapes == {"weight": {"a.weight": (4, 3), "b.weight": (2, 5)}}
    for name, written in (("a.weight", OF_A), ("b.weight", OF_B)):
        read = reader.read(name, 0, "weight")
        np.testing.assert_array_equal(read.s, written.s)
        for each in ("rows", "cols", "rank_bound", "error", "noise_floor"):
            assert getattr(read, each) == getattr(written, each), each


def test_what_a_record_lacks_is_none():
    reader = recorded({"a.weight": OF_A, "b.weight": OF_B}, {"b.weight": OF_B})
    assert reader.read("a.weight", 1, "weight") is None
    assert reader.read("b.weight", 1, "weight").error == OF_B.error
    assert reader.read("c.weight", 0, "weight") is None
    assert reader.read("a.weight", 0, "gradient") is None
