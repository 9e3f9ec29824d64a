"""Recordings of ReLoRA runs that never trained: they are written, with or without a defect."""

import numpy as np
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.auditing import Severity
from dynamics.auditing.rounding import rounded
from dynamics.recordings import GRADIENT, WEIGHT, RecordingWriter, factor_path, matrix_path
from dynamics.runs.run import Event

NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
ROWS, COLUMNS, SCALING = 24, 16, 2.0


def write_relora_run(
    store,
    *,
    steps=range(0, 40, 5),
    merges=(10, 20, 30),
    events=True,
    seed=0,
    rank=4,
    dtype="float32",
    merged=lambda update: update,
    reset=True,
    event_attrs=None,
    scalars=None,
    **spoil,
):
    """Each record adds a little to B, and each merge is exact unless told otherwise.

    Args:
        store: where to write.
        steps: the steps of the records.
        merges: the steps of the merges.
        events: whether the merges are recorded as events.
        seed: of all random numbers.
        rank: r of the adapters.
        dtype: of base and effective weights, which are rounded to it.
        merged: from the update s·B·A to what the base gets.
        reset: whether a merge draws new factors.
        event_attrs: the attributes of the merge events.
        scalars: step -> logged values.
        spoil: weight, gradient, A or B: (step, name, matrix) -> None, changes the matrix in place.

    Returns:
        `store`.
    """
    rng = np.random.default_rng(seed)
    writer = RecordingWriter(store, {})

    def stored(values):
        return rounded(values, dtype).astype(np.float32)

    def draw_factors(name):
        factors[name, "A"] = rng.uniform(-0.25, 0.25, (rank, COLUMNS)).astype(np.float32)
        factors[name, "B"] = np.zeros((ROWS, rank), np.float32)

    def update(name):
        return np.float32(SCALING) * (factors[name, "B"] @ factors[name, "A"])

    bases = {name: stored(rng.normal(0, 0.05, (ROWS, COLUMNS))) for name in NAMES}
    factors = {}
    for name in NAMES:
        draw_factors(name)
    previous = 0
    for step in steps:
        for at in [merge for merge in merges if previous <= merge < step]:
            for name in NAMES:
                bases[name] = stored(bases[name] + merged(update(name)))
                if reset:
                    draw_factors(name)
            if events:
                writer.event(Event(at, "merge", event_attrs or {}))
        previous = step
        matrices = {}
        for name in NAMES:
            growth = rng.normal(0, 0.003, (ROWS, rank)).astype(np.float32)
            factors[name, "B"] = factors[name, "B"] + growth * (step > 0)
            weight = stored(bases[name] + update(name))
            gradient = rng.normal(0, 1, weight.shape).astype(np.float32)
            record = {
                "weight": (matrix_path(WEIGHT, name), weight),
                "gradient": (matrix_path(GRADIENT, name), gradient),
                "A": (factor_path(name, "A"), factors[name, "A"].copy()),
                "B": (factor_path(name, "B"), factors[name, "B"].copy()),
            }
            for kind, (path, matrix) in record.items():
                if kind in spoil:
                    spoil[kind](step, name, matrix)
                matrices[path] = matrix
        attrs = {
            path: {
                "source_dtype": dtype if path.startswith(WEIGHT) else "float32",
                "scaling": SCALING,
                "transposed": False,
            }
            for path in matrices
        }
        values = {"loss": 5 - step / 10} if scalars is None else scalars(step)
        writer.append(step, matrices, attrs=attrs, scalars=values)
    return store


def audited(**options):
    """The report on `write_relora_run`; in memory, where writing takes a third of the time."""
    return dy.audit(dy.open_run(write_relora_run(MemoryStore(), **options)))


def severities(report):
    """Check -> its worst severity."""
    return {each.check: each.severity for each in report.summaries}


def failed_checks(report):
    return {each.check for each in report.summaries if each.severity is Severity.FAIL}


def failed(report, check):
    """The failed verdicts of a check."""
    return [each for each in report.of(check) if each.severity is Severity.FAIL]
