"""A recording as a run: weights, gradients and adapters as `probes.Recorder` wrote them."""

from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.formats.format import Format, OpenOptions
from dynamics.formats.shared.evaluations import with_evaluations
from dynamics.formats.storage.files import is_remote
from dynamics.recordings import (
    ADAPTER,
    BASE,
    GRADIENT,
    SPARSE_ENTRIES,
    WEIGHT,
    Recording,
    SpectraReader,
    StoreLike,
    Verification,
    factor_path,
    is_repository_folder,
    matrix_path,
    store_name,
    verify,
)
from dynamics.runs.account import Account
from dynamics.runs.run import Dense, Event, Factored, Matrix, Run, Spectrum, matrices_of

_GROUPS = {schema.WEIGHT: WEIGHT, schema.GRADIENT: GRADIENT}


class RecordingFormat(Format):
    """A recording in a directory or behind a URL."""

    name = "recording"
    description = "a recording made by probes.Recorder (a Zarr store)"

    def recognises(self, path: Path) -> bool:
        """Whether `path` is the root of a Zarr v3 store, or an Icechunk repository on this disk."""
        if (path / "zarr.json").is_file():
            return True
        return not is_remote(path) and is_repository_folder(path)

    def open(self, path: Path, options: OpenOptions) -> Run:
        """See `Format.open`."""
        return RecordingRun(path)


class RecordingRun(Run):
    """One recording, as its last commit shows it when it is opened.

    Args:
        path: a path, a zarr Store, or an Icechunk repository.
        recording: what is there, where it is open already.

    Raises:
        FormatError: there is no recording, or it is damaged or of a newer version.
    """

    format = RecordingFormat.name
    merges_told_by_events = True

    def __init__(self, path: StoreLike, recording: Recording | None = None):
        self.path = store_name(path)
        self._folder = path.parent if isinstance(path, Path) else None
        self._recording = Recording(path) if recording is None else recording
        self.steps = self._recording.steps
        self.attrs: Mapping[str, Any] = self._recording.attrs
        self.account = Account.from_json(self.attrs.get("account"))
        self._index = {int(step): index for index, step in enumerate(self.steps)}
        self._with_adapter = set(self._recording.parameters(ADAPTER))
        self._with_base = set(self._recording.parameters(BASE))
        self._spectra = SpectraReader(self._recording)
        self.spectrum_kinds = tuple(self._spectra.shapes)
        of_spectra = (shapes.items() for shapes in self._spectra.shapes.values())
        self.matrices = matrices_of(
            dict(chain.from_iterable(of_spectra))
            | {name: self._adapter_shape(name) for name in self._with_adapter}
            | {
                name: self._recording.array(matrix_path(group, name)).shape[1:]
                for group in (WEIGHT, GRADIENT)
                for name in self._recording.parameters(group)
            }
        )
        self._gradients = {
            matrix_path(GRADIENT, name) for name in self._recording.parameters(GRADIENT)
        }
        if self.spectrum_kinds:
            self.stored_kinds = ()  # at most those that displacements refer to
            return
        weights = self._recording.parameters(WEIGHT)
        self.stored_kinds = (
            *((schema.WEIGHT,) if weights else ()),
            *((schema.BASE,) if weights and self._with_adapter | self._with_base else ()),
            *((schema.ADAPTER,) if self._with_adapter else ()),
            *((schema.GRADIENT,) if self._recording.parameters(GRADIENT) else ()),
        )

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """A stored matrix; see `Run.read`.

        `base` is the recorded effective weight minus s·B·A. It is exact up to the rounding of the
        dtype in which the two were added; this rounding is the weight's own noise. Where the weight
        is no such sum, the base itself was recorded.
        """
        index = self._index[step]
        if kind == schema.BASE and name in self._with_base:
            at = self._base_index(name, index)
            return None if at is None else self._dense(BASE, name, at)
        if kind == schema.ADAPTER:
            return self._adapter(name, index)
        if kind == schema.BASE:
            weight, adapter = self._dense(WEIGHT, name, index), self._adapter(name, index)
            if weight is None or adapter is None:
                return weight
            return Dense(weight.values.astype(np.float64) - adapter.product(), weight.dtype)
        return self._dense(_GROUPS[kind], name, index) if kind in _GROUPS else None

    def read_spectrum(self, name: str, step: int, kind: str) -> Spectrum | None:
        """A spectrum that the recorder measured; see `Run.read_spectrum`."""
        return self._spectra.read(name, self._index[step], kind)

    def origin(self, name: str, step: int, kind: str) -> str | None:
        """The chunks that `read` takes the matrix from; see `Run.origin`."""
        if kind == schema.BASE and name in self._with_base:
            at = self._base_index(name, self._index[step])
            origin = None if at is None else self._recording.origin(matrix_path(BASE, name), at)
            return None if origin is None else f"{kind} {origin}"
        has_factors = kind in (schema.ADAPTER, schema.BASE) and name in self._with_adapter
        paths = [factor_path(name, factor) for factor in "AB"] if has_factors else []
        if kind != schema.ADAPTER:
            paths.append(matrix_path(_GROUPS.get(kind, WEIGHT), name))
        origins = [self._recording.origin(path, self._index[step]) for path in paths]
        return None if None in origins else " ".join([kind, *map(str, origins)])

    def verify(self) -> Verification:
        """Check that every record holds the numbers that were written; reads them all."""
        return verify(self._recording)

    def merges_between(self, name: str, before: int, now: int) -> int:
        """How many merges happened between the record at `before` and the one at `now`."""
        if name not in self._with_adapter:
            return 0
        merges = (event.step for event in self.events if event.kind == schema.MERGE)
        return sum(before <= step < now for step in merges)

    def _base_index(self, name: str, index: int) -> int | None:
        """The record that holds the base weight as it was in record `index`."""
        path = matrix_path(BASE, name)
        return next((i for i in range(index, -1, -1) if self._recording.has(path, i)), None)

    def trains(self, name: str) -> bool | None:
        """Whether the recorded gradient is one that an optimizer took; see `Run.trains`."""
        if self.sparse_entries(name) is not None:
            return True
        path = matrix_path(GRADIENT, name)
        if schema.GRADIENT not in self.stored_kinds or path not in self._gradients:
            return None
        return self._recording.array(path).attrs.get("probed") is not True

    def sparse_entries(self, name: str) -> int | None:
        """What the recorder counted; see `Run.sparse_entries`."""
        if name not in self._with_base:
            return None
        path = matrix_path(BASE, name)
        if SPARSE_ENTRIES not in self._recording.array(path).attrs:
            return None
        return int(self._recording.attr(path, SPARSE_ENTRIES, int))

    def _dense(self, group: str, name: str, index: int) -> Dense | None:
        path = matrix_path(group, name)
        values = self._recording.read(path, index)
        return None if values is None else Dense(values, self._source_dtype(path))

    def _adapter(self, name: str, index: int) -> Factored | None:
        if name not in self._with_adapter:
            return None
        path = factor_path(name, "A")
        a, b = (self._recording.read(factor_path(name, factor), index) for factor in "AB")
        if a is None or b is None:
            return None
        dtype = self._source_dtype(path)
        scale = float(self._recording.attr(path, "scaling", int, float))
        if self._recording.attr(path, "transposed", bool):
            return Factored(a.T, b.T, scale, dtype, transposed=True)
        return Factored(b, a, scale, dtype)

    def _adapter_shape(self, name: str) -> tuple[int, ...]:
        a, b = (self._recording.array(factor_path(name, factor)) for factor in "AB")
        out_in = b.shape[1], a.shape[2]
        transposed = self._recording.attr(factor_path(name, "A"), "transposed", bool)
        return out_in[::-1] if transposed else out_in

    def _source_dtype(self, path: str) -> str:
        return str(self._recording.attr(path, "source_dtype", str))

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """Merges, optimizer resets and resumes, in order."""
        return self._recording.events

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Along the steps: what was logged, and what evaluation.jsonl in the same folder holds."""
        logged = self._recording.scalars
        if self._folder is None:
            return logged
        return with_evaluations(logged, self._folder, self._folder, self.steps)
