"""The Dataset of an analysis, filled cell by cell in any order."""

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from math import ceil, prod
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.selection import Selection
from dynamics.analysis.tasks import Outcome
from dynamics.errors import FormatError
from dynamics.metrics import METRICS, Metric
from dynamics.runs.differences import cycle_start, reference_step
from dynamics.runs.run import MatrixInfo, Run, Spectrum
from dynamics.schema import Status

_IN_MEMORY = 2**28  # bytes of singular values
_AT_ONCE = 2**20  # singular values that metrics are computed of, about
# What a cell has besides them.
_SPECTRUM = ("rows", "cols", "rank_bound", "error", "noise_floor")


class ResultBuilder:
    """The cells of an analysis: put in as they are measured, a Dataset at the end.

    Args:
        chosen: what is measured.
        backend: the version of what measures besides NumPy, see `gpu_backend.backend_version`.
    """

    def __init__(self, chosen: Selection, backend: str = ""):
        self._chosen, self._backend = chosen, backend
        infos = [each.info for each in chosen.matrices]
        shape = (len(chosen.kinds), len(chosen.steps), len(infos))
        width = max(min(info.rows, info.cols) for info in infos)
        self._singular = _array((*shape, width))
        self._numbers = {name: np.full(shape, np.nan) for name in _SPECTRUM}
        self._storage_noise = np.full(shape, np.nan)
        self._values = {name: np.full(shape, np.nan) for name in chosen.metrics}
        self._status = np.zeros(shape, dtype=np.int8)
        self._problems: dict[tuple[int, int, int], str] = {}
        self._kind = {kind: k for k, kind in enumerate(chosen.kinds)}
        self._step = {step: t for t, step in enumerate(chosen.steps)}
        self._matrix = {
            (each.component, each.info.name): m for m, each in enumerate(chosen.matrices)
        }
        self.done = 0
        self.total = self._status.size

    def put(self, component: str, name: str, outcome: Outcome) -> None:
        """Enter what became of a cell."""
        k, t = self._kind[outcome.kind], self._step[outcome.step]
        m = self._matrix[component, name]
        self.done += 1
        self._status[k, t, m] = outcome.status
        if outcome.listed:
            self._problems[m, t, k] = str(outcome.problem)
        self._singular[k, t, m] = np.nan
        if (spectrum := outcome.spectrum) is not None:
            self._singular[k, t, m, : spectrum.s.size] = spectrum.s
            for each in _SPECTRUM:
                self._numbers[each][k, t, m] = getattr(spectrum, each)
            storage = spectrum.storage_noise_floor
            self._storage_noise[k, t, m] = spectrum.noise_floor if storage is None else storage
        if outcome.study is not None and outcome.study.s.size:
            for each, metric in self._chosen.metrics.items():
                if metric.of_study:
                    self._values[each][k, t, m] = metric.function(outcome.study)

    @property
    def problems(self) -> list[str]:
        """What could not be measured, matrix by matrix, each text once."""
        return list(dict.fromkeys(text for _, text in sorted(self._problems.items())))

    def dataset(self) -> xr.Dataset:
        """What `analyze` returns, once every cell is put in."""
        chosen, run = self._chosen, self._chosen.run
        values = self._metrics()
        values[schema.NOISE_FLOOR] = self._numbers["noise_floor"]
        values[schema.STORAGE_NOISE_FLOOR] = self._storage_noise
        values[schema.SINGULAR_VALUE_ERROR] = self._numbers["error"]
        dataset = _dataset(
            chosen.metrics,
            values,
            self._singular,
            self._status,
            [each[:2] for each in chosen.matrices],
        )
        steps = np.array(chosen.steps, dtype=np.int64)
        dataset = dataset.assign_coords(kind=chosen.kinds, step=steps)
        dataset[schema.REFERENCE_STEP] = (
            (schema.KIND, schema.STEP),
            [[self._reference_step(kind, step) for step in chosen.steps] for kind in chosen.kinds],
            {
                "long_name": f"step of the weight that is subtracted, {schema.NO_STEP} for none",
                "units": "optimizer steps",
            },
        )
        positions = np.searchsorted(run.steps, steps)
        for name, series in run.scalars.items():
            variable = name.replace("/", ".")  # a slash is a group to Zarr
            taken = {*METRICS, *dataset.variables, *dataset.dims}
            dataset[f"logged_{variable}" if variable in taken else variable] = (
                schema.STEP,
                series[positions],
                {"long_name": name.replace("_", " ")},
            )
        if chosen.lag is not None:
            dataset.attrs[schema.LAG] = chosen.lag
        return dataset.assign_attrs(
            _provenance(run, self._backend), problems=json.dumps(self.problems)
        )

    def _reference_step(self, kind: str, step: int) -> int:
        """Where the interval of a difference begins. Cycles are those of one measured matrix."""
        if kind not in schema.DIFFERENCES:
            return schema.NO_STEP
        try:
            found = (
                self._cycle_start(step)
                if kind == schema.CYCLE_UPDATE
                else reference_step(self._chosen.run, "", step, kind)
            )
        except FormatError:  # the base of a checkpoint was removed since
            found = None
        return schema.NO_STEP if found is None else found

    def _cycle_start(self, step: int) -> int | None:
        run, matrices = self._chosen.run, self._chosen.matrices
        status = self._status[self._kind[schema.CYCLE_UPDATE], self._step[step]]
        measured = [matrices[m].info for m in np.flatnonzero(status == Status.MEASURED)]
        stored = [each for each in measured if each.name in run.matrices]
        if stored:  # the smallest, because bases of checkpoints are compared
            return cycle_start(run, min(stored, key=lambda info: info.rows * info.cols).name, step)
        of_circuits = [
            name
            for name, info in run.matrices.items()
            if any(info.layer == each.layer for each in measured[:1])
        ]
        starts = (reference_step(run, name, step, schema.CYCLE_UPDATE) for name in of_circuits)
        return next((each for each in starts if each is not None), None)

    def _metrics(self) -> dict[str, np.ndarray]:
        """Of many cells of a matrix at once: for one at a time, a call costs more than its sums."""
        values = dict(self._values)
        for m in range(len(self._chosen.matrices)):
            numbers = {name: each[:, :, m] for name, each in self._numbers.items()}
            measured = self._status[:, :, m] == Status.MEASURED
            shapes = np.stack([numbers["rows"], numbers["cols"]], axis=-1)
            # One, unless the model was changed during the run: a vocabulary that grew.
            for rows, cols in np.unique(shapes[measured], axis=0).astype(int).tolist():
                k = min(rows, cols)
                cells = np.argwhere(measured & (shapes == (rows, cols)).all(axis=-1))
                for part in np.array_split(cells, ceil(len(cells) * k / _AT_ONCE)):
                    at = tuple(part.T)
                    s = self._singular[:, :, m, :k][at]
                    others = (numbers[name][at] for name in _SPECTRUM[2:])
                    spectra = Spectrum(s, rows, cols, *others)
                    for name, metric in self._chosen.metrics.items():
                        if not metric.of_study:
                            values[name][:, :, m][at] = metric.function(spectra)
        return values


def _array(shape: tuple[int, ...]) -> np.ndarray:
    """A float64 array to be filled; a large one lies in a temporary file that has no name.

    So the memory of an analysis does not grow with the number of steps: of a thousand checkpoints
    of a 7B model in three kinds, the singular values are 22 GB.
    """
    size = 8 * prod(shape)
    if size > _IN_MEMORY and hasattr(os, "posix_fallocate"):
        with suppress(OSError), tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # rather now than a crash without a message
            return np.memmap(file, np.float64, "r+", shape=shape)
    return np.empty(shape)


def _dataset(
    table: dict[str, Metric],
    values: dict[str, np.ndarray],
    singular: np.ndarray,
    status: np.ndarray,
    infos: list[tuple[str, MatrixInfo]],
) -> xr.Dataset:
    dims = (schema.KIND, schema.STEP, schema.MATRIX)
    of_matrix = {"units": "units of the matrix"}
    variables: dict[str, tuple] = {
        name: (
            dims,
            values[name],
            {"long_name": metric.long_name, "units": metric.units, "reference": metric.reference},
        )
        for name, metric in table.items()
    }
    variables[schema.SINGULAR_VALUE] = (
        (*dims, schema.INDEX),
        singular,
        {"long_name": "singular value", **of_matrix},
    )
    variables[schema.SINGULAR_VALUE_ERROR] = (
        dims,
        values[schema.SINGULAR_VALUE_ERROR],
        {"long_name": "bound on the computation's error of every singular value", **of_matrix},
    )
    variables[schema.NOISE_FLOOR] = (
        dims,
        values[schema.NOISE_FLOOR],
        {"long_name": "spectral norm of the noise of all roundings, those of training too"}
        | of_matrix,
    )
    variables[schema.STORAGE_NOISE_FLOOR] = (
        dims,
        values[schema.STORAGE_NOISE_FLOOR],
        {"long_name": "spectral norm of the stored numbers' rounding noise", **of_matrix},
    )
    variables[schema.STATUS] = (
        dims,
        status,
        {
            "long_name": "why a value is there or not",
            "flag_values": [int(each) for each in Status],
            "flag_meanings": " ".join(each.name.lower() for each in Status),
        },
    )
    coords = {**matrix_coords(infos), schema.INDEX: np.arange(singular.shape[-1])}
    return xr.Dataset(variables, coords=coords)


def matrix_coords(infos: list[tuple[str, MatrixInfo]]) -> dict[str, Any]:
    """The coordinates along `matrix` for (component, matrix) pairs."""
    return {
        schema.MATRIX: [info.name for _, info in infos],
        "component": (schema.MATRIX, [component for component, _ in infos]),
        "layer": _numbered(
            [info.layer for _, info in infos], schema.NO_LAYER, "layer index", "outside the layers"
        ),
        "module": (schema.MATRIX, [info.module for _, info in infos]),
        "stack": (schema.MATRIX, [info.stack for _, info in infos]),
        "attention": (schema.MATRIX, [info.attention for _, info in infos]),
        "head": _numbered(
            [info.head for _, info in infos],
            schema.NO_HEAD,
            "query head",
            "where it belongs to no single one",
        ),
        "expert": _numbered(
            [info.expert for _, info in infos],
            schema.NO_EXPERT,
            "routed expert",
            "outside of experts",
        ),
        "rows": (schema.MATRIX, [info.rows for _, info in infos]),
        "cols": (schema.MATRIX, [info.cols for _, info in infos]),
    }


def _numbered(indices: list[int | None], none: int, what: str, where_none: str) -> tuple:
    numbers = np.array([none if each is None else each for each in indices], dtype=np.int64)
    return schema.MATRIX, numbers, {"long_name": f"{what}, {none} {where_none}"}


def _provenance(run: Run, backend: str) -> dict[str, str | int]:
    return {
        "format": schema.ANALYSIS_FORMAT,
        "format_version": schema.ANALYSIS_VERSION,
        "source": run.path,
        "source_format": run.format,
        "source_attrs": json.dumps(dict(run.attrs), default=str),
        "events": json.dumps([asdict(event) for event in run.events]),
        "passed_over": json.dumps(dict(run.passed_over)),
        "account": json.dumps(run.account and run.account.to_json()),
        "left_out": json.dumps(
            {each.name: each.reason for each in run.account.left_out} if run.account else {}
        ),
        "measured_by": backend or "cpu",
        "versions": json.dumps(
            {name: version(name) for name in ("learning-dynamics", "numpy", "scipy")}
        ),
    }
