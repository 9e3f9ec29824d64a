"""analyze(): every metric of every matrix of a run, over its steps, as one xarray Dataset."""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.derived import Difference, is_finite
from dynamics.errors import DynamicsError, FormatError
from dynamics.formats import open_run
from dynamics.metrics import METRICS, Metric
from dynamics.run import Dense, Factored, MatrixInfo, Run, Spectrum
from dynamics.schema import Status
from dynamics.selection import Chosen, Selection, selected
from dynamics.spectra import spectrum
from dynamics.spectrum_cache import SpectrumCache, content_key
from dynamics.tracing import TracedRun

Progress = Callable[[int, int, str], None]


class StoppedError(Exception):
    """An analysis was told to stop before it was done."""


class UnmeasuredWarning(UserWarning):
    """A matrix or a checkpoint could not be measured; the rest was."""


def analyze(
    run: Run | str | Path,
    *,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Iterable[int] | None = None,
    select: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    cache: str | Path | None = None,
    strict: bool = False,
) -> xr.Dataset:
    """Measure a run.

    Args:
        run: a Run, or the path of one.
        metrics: names of `METRICS`; all by default.
        components: names of `COMPONENTS`; `parameters` by default.
        kinds: names of `schema.KINDS`; all that the run has by default.
        steps: steps of the run; all by default. `update` and `displacement` refer to the run's
            previous and first step, whether these are selected or not.
        select: globs over parameter names ("*_proj" matches with or without ".weight").
        progress: called as progress(done, total, matrix name) while it works.
        cache: a file that keeps the spectra, made if it is missing. What it has is not measured
            again, and not even read where nothing changed (`Run.origin`); the result is the same.
        strict: raise at the first matrix that is unreadable or not finite, instead of listing it.

    Returns:
        A Dataset with dims (kind, step, matrix) and (..., index) for the singular values: one
        variable per metric, `singular_value` padded with NaN, `singular_value_error`,
        `noise_floor`, `status` (see `schema.Status`), and the run's scalars along `step`, as
        `logged_<name>` where the name is one of those above ("train/loss" is `train.loss`). NaN is
        "not measured", and `status` says why. `attrs["problems"]` lists as JSON what was found
        unmeasurable; each is also an UnmeasuredWarning.

    Raises:
        MissingError: an unknown metric, component, kind or step, or nothing selected.
        FormatError: `run` cannot be opened, or with `strict` not read.
        DynamicsError: `cache` is damaged or no cache; with `strict`, a matrix holds NaN or Inf.
    """
    run = run if isinstance(run, Run) else open_run(run)
    chosen = selected(
        run, metrics=metrics, components=components, kinds=kinds, steps=steps, select=select
    )
    return measure(chosen, cache=cache, strict=strict, progress=progress)


def measure(
    chosen: Selection,
    *,
    cache: str | Path | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> xr.Dataset:
    """What `analyze` returns for a selection.

    Args:
        chosen: what to measure.
        cache: see `analyze`.
        strict: see `analyze`.
        progress: see `analyze`.
        stopped: asked before every matrix at every step and kind whether to give up.

    Raises:
        StoppedError: `stopped` said so; what was measured is in the cache.
    """
    run, table, infos = chosen.run, chosen.metrics, [each.info for each in chosen.matrices]
    shape = (len(chosen.kinds), len(chosen.steps), len(infos))
    width = max(min(info.rows, info.cols) for info in infos)
    values = {
        name: np.full(shape, np.nan)
        for name in (*table, schema.NOISE_FLOOR, schema.SINGULAR_VALUE_ERROR)
    }
    singular = np.full((*shape, width), np.nan)
    status = np.zeros(shape, dtype=np.int8)
    problems: dict[str, None] = {}  # an ordered set

    with nullcontext() if cache is None else SpectrumCache(cache) as known:
        for m, each in enumerate(chosen.matrices):
            for t, step in enumerate(chosen.steps):
                for k, kind in enumerate(chosen.kinds):
                    if stopped():
                        raise StoppedError(f"The analysis of {run.path} was stopped.")
                    try:
                        found = _measured(run, each, step, kind, known)
                    except _Unmeasured as reason:
                        if strict and reason.problem is not None:
                            raise reason.problem from reason
                        if reason.listed:
                            problems[str(reason.problem)] = None
                        status[k, t, m] = reason.status
                        continue
                    status[k, t, m] = Status.MEASURED
                    singular[k, t, m, : found.s.size] = found.s
                    values[schema.NOISE_FLOOR][k, t, m] = found.noise_floor
                    values[schema.SINGULAR_VALUE_ERROR][k, t, m] = found.error
                    for name, metric in table.items():
                        values[name][k, t, m] = metric.function(found)
            if progress is not None:
                progress(m + 1, len(infos), each.info.name)

    for problem in problems:
        warnings.warn(problem, UnmeasuredWarning, stacklevel=3)
    dataset = _dataset(table, values, singular, status, [each[:2] for each in chosen.matrices])
    steps = np.array(chosen.steps, dtype=np.int64)
    dataset = dataset.assign_coords(kind=chosen.kinds, step=steps)
    positions = np.searchsorted(run.steps, steps)
    for name, series in run.scalars.items():
        variable = name.replace("/", ".")  # a slash is a group to Zarr
        taken = {*METRICS, *dataset.variables, *dataset.dims}
        dataset[f"logged_{variable}" if variable in taken else variable] = (
            schema.STEP,
            series[positions],
            {"long_name": name.replace("_", " ")},
        )
    return dataset.assign_attrs(_provenance(run), problems=json.dumps(list(problems)))


class _Unmeasured(Exception):
    """Why a cell holds no number: its status, and the problem where it is one.

    `listed` is False for what is a problem of another cell that names it.
    """

    def __init__(self, status: Status, problem: DynamicsError | None = None, listed: bool = True):
        super().__init__(status)
        self.status, self.problem = status, problem
        self.listed = listed and problem is not None


def _measured(
    run: TracedRun, chosen: Chosen, step: int, kind: str, known: SpectrumCache | None
) -> Spectrum:
    """The spectrum of one cell: a known one, where possible without reading anything."""
    if known is None:
        return spectrum(_matrix(chosen, step, kind))
    cell = run.cell_key(chosen.component, chosen.info.name, step, kind)
    if (found := known.of_cell(cell, run)) is not None:
        return found
    run.start_cell()
    matrix = _matrix(chosen, step, kind)
    if isinstance(matrix, Spectrum):
        return matrix
    content = content_key(matrix)
    if (found := known.of_content(content)) is None:
        found = spectrum(matrix)
        known.put(content, found)
    known.put_cell(cell, run, content)
    return found


def _matrix(chosen: Chosen, step: int, kind: str) -> Dense | Factored | Difference | Spectrum:
    try:
        found = chosen.read(step, kind)
    except FormatError as problem:
        raise _Unmeasured(Status.UNREADABLE, problem) from problem
    if isinstance(found, Status):
        raise _Unmeasured(found)
    if not is_finite(found):
        text = f"{chosen.info.name} ({kind}) at step {step} holds NaN or Inf; it was not measured."
        # Of a difference, the weights themselves are named.
        raise _Unmeasured(
            Status.NON_FINITE, DynamicsError(text), listed=not isinstance(found, Difference)
        )
    return found


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
        "layer": (
            schema.MATRIX,
            np.array(
                [schema.NO_LAYER if i.layer is None else i.layer for _, i in infos], dtype=np.int64
            ),
            {"long_name": f"layer index, {schema.NO_LAYER} outside the stack of layers"},
        ),
        "module": (schema.MATRIX, [info.module for _, info in infos]),
        "head": (
            schema.MATRIX,
            np.array(
                [schema.NO_HEAD if i.head is None else i.head for _, i in infos], dtype=np.int64
            ),
            {"long_name": f"query head, {schema.NO_HEAD} where it belongs to no single one"},
        ),
        "rows": (schema.MATRIX, [info.rows for _, info in infos]),
        "cols": (schema.MATRIX, [info.cols for _, info in infos]),
    }


def _provenance(run: Run) -> dict[str, str | int]:
    return {
        "format": schema.ANALYSIS_FORMAT,
        "format_version": schema.ANALYSIS_VERSION,
        "source": run.path,
        "source_format": run.format,
        "source_attrs": json.dumps(dict(run.attrs), default=str),
        "events": json.dumps([asdict(event) for event in run.events]),
        "versions": json.dumps(
            {name: version(name) for name in ("learning-dynamics", "numpy", "scipy")}
        ),
    }
