"""What docs/results.md is made from: the example `low_rank_micro`, out of the study's runs.

    python -m probes.relora sweep micro --methods all --seeds 0,1,2 --steps 560 --output RUNS
    python docs/results_data.py RUNS

The first command takes hours and goes on where it was interrupted; RUNS/runs.cache keeps what the
second one has measured. It takes the metrics that the page shows, in float32, and adds where
gradients and displacements point, and what each check of the audit says.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import dynamics as dy
from dynamics import schema
from probes.relora.config import METHODS
from probes.relora.sweep import compare_runs
from probes.relora.sweep_plan import SweepRun, plan
from probes.relora.training.run_directory import RECORDING_NAME

EXAMPLE = Path(__file__).parents[1] / "dynamics" / "analysis" / "examples" / "low_rank_micro.zip"
Verdicts = dict[str, list[str]]  # check -> its severity, and the meaning of its worst verdict
SEEDS = (0, 1, 2)
STEPS = 560
RANK = 8
HALF = 280  # the weight that intruders are counted against has learned something by then
SPECTRA_AT = (80, 320, 560)
MEASURED: dict[str, Any] = {
    "kinds": [
        schema.WEIGHT,
        schema.BASE,
        schema.ADAPTER,
        schema.GRADIENT,
        schema.UPDATE,
        schema.DISPLACEMENT,
    ],
    "metrics": [
        "effective_rank",
        "proportional_effective_rank",
        "rank_bound",
        "rank_bound_use",
        "stable_rank",
        "numerical_rank",
        "condition_number",
        "frobenius_norm",
    ],
    "components": ["parameters"],
    "steps": range(0, STEPS + 1, 20),
}
STUDY_METRICS = ["study_rank", "study_effective_rank"]
OF_STUDY: dict[str, Any] = {
    "kinds": [schema.UPDATE],
    "metrics": STUDY_METRICS,
    "components": ["parameters"],
    "steps": SPECTRA_AT,
}
WORKERS = 2


def collect(runs: list[SweepRun], folder: Path) -> xr.Dataset:
    """The comparison of the study's runs, with their directions and audits."""
    pointing, verdicts = of_runs([run.name for run in runs], folder)
    found, study = (compare_runs(runs, folder, **each) for each in (MEASURED, OF_STUDY))
    for name in STUDY_METRICS:
        found[name] = study[name].reindex_like(found)
    # All spectra would be most of the file.
    shown = found[schema.KIND].isin([schema.UPDATE, schema.DISPLACEMENT])
    found[schema.SINGULAR_VALUE] = found[schema.SINGULAR_VALUE].where(
        shown & found[schema.STEP].isin(SPECTRA_AT)
    )
    found = found.drop_vars(schema.SINGULAR_VALUE_ERROR)
    kept = {
        name: found.attrs[name]
        for name in ("format", "format_version", "versions", "events", "problems")
        if name in found.attrs
    }
    found = found.drop_attrs(deep=False).assign_attrs(
        kept,
        source="nine methods of the reference experiment at the size micro, docs/results.md",
        audits=json.dumps(verdicts),
    )
    for name, values in pointing.items():
        found[name] = values.reindex_like(found)
    return found.map(lambda each: each.astype(np.float32) if each.dtype == np.float64 else each)


def of_runs(names: list[str], folder: Path) -> tuple[dict[str, xr.DataArray], dict[str, Verdicts]]:
    """Where gradients and weights point, along run, kind, step and matrix; and run -> its audit."""
    found: dict[str, list[xr.DataArray]] = {}
    verdicts = {}
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        for run, pointing, verdict in pool.map(_of_run, [folder] * len(names), names):
            verdicts[run] = verdict
            for name, values in pointing.items():
                found.setdefault(name, []).append(values.expand_dims({schema.RUN: [run]}))
            print(run, flush=True)
    joined = {
        name: xr.concat(values, schema.RUN, join="outer", combine_attrs="override")
        for name, values in found.items()
    }
    return joined, verdicts


def _of_run(folder: Path, run: str) -> tuple[str, dict[str, xr.DataArray], Verdicts]:
    path = folder / run / RECORDING_NAME
    twin = folder / f"full_rank-{run[run.index('seed=') :]}" / RECORDING_NAME
    for each in (MEASURED, OF_STUDY):  # into the cache that the comparison takes
        own = [kind for kind in each["kinds"] if kind in dy.open_run(path).kinds]
        dy.analyze(path, cache=folder / run / "run.cache", **{**each, "kinds": own})
    found = {}
    for prefix, measure in (
        ("gradient", lambda: dy.gradient_subspaces(path, k=RANK)),
        ("intruder", lambda: dy.intruders(path, since=HALF)),
        ("twin", lambda: dy.run_alignment(path, twin, kind=schema.DISPLACEMENT, k=RANK)),
    ):
        measured = _kept(folder / run / f"{prefix}.zarr", measure)
        measured = measured.reset_coords(set(measured.coords) - set(measured.dims), drop=True)
        found |= {f"{prefix}_{name}": values for name, values in measured.data_vars.items()}
    report = dy.audit(path)
    verdicts = {each.check: [each.severity, each.worst.meaning] for each in report.summaries}
    return run, found, verdicts


def _kept(path: Path, measure: Callable[[], xr.Dataset]) -> xr.Dataset:
    """A measurement, kept beside the run: all of them take minutes."""
    if not path.exists():
        measure().to_zarr(path, consolidated=False)
    return xr.open_zarr(path, consolidated=False).load()


def main(folder: Path) -> None:
    """Write the example."""
    runs = plan("micro", methods=METHODS, words=[f"max_steps={STEPS}"], seeds=SEEDS)
    with tempfile.TemporaryDirectory() as working:
        dy.save(collect(runs, folder), Path(working) / f"{EXAMPLE.stem}.zarr")
        shutil.make_archive(str(EXAMPLE.with_suffix("")), "zip", working)
    print(f"Wrote {EXAMPLE}, {EXAMPLE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
