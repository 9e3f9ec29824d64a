"""Trains the runs of a sweep, one after another or side by side, and compares them."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import dynamics as dy
from dynamics import schema
from dynamics.errors import DynamicsError, MissingError
from probes.relora.model import parameter_counts
from probes.relora.sweep_plan import SweepRun, tokens_per_step, train_words, warn_of_schedules
from probes.relora.training.run_directory import CONFIG_NAME, RECORDING_NAME, is_finished

COMPARISON_NAME = "comparison.zarr"
SEED = "seed"


def run_sweep(
    runs: Sequence[SweepRun],
    preset: str,
    output: Path,
    *,
    text: Path | None = None,
    workers: int = 1,
    kinds: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> xr.Dataset:
    """Train the runs that are not finished, each in `output`/NAME, and compare all of them.

    Each run is a process of its own, `python -m probes.relora train`, with its output in
    `output`/NAME.log. Finished runs are skipped, interrupted ones resumed. If one fails, the others
    are trained nevertheless. With several workers, each gets its share of the CPU cores; to get the
    same numbers again, use the same number of workers.

    Args:
        runs: from `plan`.
        preset: the preset that they were planned from.
        output: the folder of the sweep.
        text: a folder of .txt files, as in `run_experiment`.
        workers: how many runs train at the same time.
        kinds: the kinds to compare; all by default, see `analyze`.
        say: gets a line when a run begins and ends; prints it by default.

    Returns:
        The result of `compare_runs`, which is also saved to `output`/comparison.zarr.

    Raises:
        DynamicsError: fewer than two runs, a folder that holds another run, or runs that failed.
    """
    if len(runs) < 2:
        raise DynamicsError("A sweep takes two runs or more; vary a setting, the method or seeds.")
    say = say or _say
    warn_of_schedules(runs)
    output.mkdir(parents=True, exist_ok=True)
    finished = {run.name: is_finished(output / run.name, run.config) for run in runs}

    def one(run: SweepRun) -> str | None:
        if finished[run.name]:
            say(f"{run.name}: finished before")
            return None
        say(f"{run.name}: training")
        failure = _train(run, preset, output, text, workers)
        say(f"{run.name}: {failure or 'finished'}")
        return failure

    with ThreadPoolExecutor(workers) as pool:
        failures = [failure for failure in pool.map(one, runs) if failure]
    if failures:
        raise DynamicsError(
            f"{len(failures)} of {len(runs)} runs failed, the first one: {failures[0]}. The others "
            "are kept; fix the cause and repeat the command, which continues from there."
        )
    say(f"Comparing {len(runs)} runs")
    comparison = compare_runs(runs, output, kinds=kinds)
    dy.save(comparison, output / COMPARISON_NAME, overwrite=True)
    say(f"Wrote {output / COMPARISON_NAME}")
    return comparison


def compare_runs(
    runs: Sequence[SweepRun],
    output: Path,
    *,
    kinds: Sequence[str] | None = None,
    **options: Any,
) -> xr.Dataset:
    """All runs in one Dataset along `run`, by name.

    Coordinates along `run`: each varied field (numbers as numbers), `method`, `seed`,
    `trainable_parameters` and `tokens_per_step`. Spectra are kept beside each recording
    (run.cache), so a second comparison measures only what is new.

    Args:
        runs: from `plan`.
        output: the folder of the sweep.
        kinds: the kinds to measure, in the runs that have them (full rank has no adapters); all
            by default.
        options: options of `analyze`.

    Raises:
        MissingError: a run has none of the kinds, or no run has one of them.
    """
    analyses, known = {}, set()
    for name in (run.name for run in runs):
        recording = dy.open_run(output / name / RECORDING_NAME)
        known |= set(recording.kinds)
        own = None if kinds is None else [kind for kind in kinds if kind in recording.kinds]
        if own == []:
            raise MissingError(
                f"{name} has no {' or '.join(kinds or ())} matrices to compare; it has "
                f"{', '.join(recording.kinds)}."
            )
        analyses[name] = dy.analyze(
            recording, cache=output / name / "run.cache", kinds=own, **options
        )
    if missing := [kind for kind in kinds or () if kind not in known]:
        raise MissingError(f"No run has {', '.join(missing)} matrices to compare.")
    coords = {name: (schema.RUN, _column(runs, name)) for name in runs[0].varied}
    coords["trainable_parameters"] = (
        schema.RUN,
        [parameter_counts(run.config)[0] for run in runs],
    )
    coords["tokens_per_step"] = (schema.RUN, [tokens_per_step(run.config) for run in runs])
    return dy.compare(analyses).assign_coords(coords)


def over_seeds(
    comparison: xr.Dataset, metric: str, *, by_layer: bool = False, level: float = 0.95
) -> xr.Dataset:
    """Mean and t confidence interval of a variable over the seeds of otherwise equal runs.

    First, the mean over the matrices inside layers is taken within each run: over all layers, or
    for each layer. Matrices of one run are not independent measurements, but runs with different
    seeds are. For a variable without matrices, such as a loss, this first mean is left out.

    Args:
        comparison: from `compare_runs`; select a `kind` or some matrices first if you need to.
        metric: the name of a variable, e.g. "effective_rank" or "eval_loss".
        by_layer: keep the layers apart, along a new dimension `layer`.
        level: the confidence level, see `mean_interval`.

    Returns:
        `mean`, `lower`, `upper` and `count` along `run`, see `dynamics.over`. All seeds of a
        setting become one entry, with the coordinates of the setting. Its name is the name of the
        run without the seed.

    Raises:
        DynamicsError: no two runs differ in their seed alone.
        MissingError: neither a coordinate `seed` nor the names of the runs tell their seeds.

    Example:
        >>> import xarray as xr
        >>> from probes.relora.sweep import over_seeds
        >>> runs = ["relora-seed=0", "relora-seed=1", "lora-seed=0", "lora-seed=1"]
        >>> comparison = xr.Dataset(
        ...     {"eval_loss": ("run", [3.0, 3.2, 3.5, 3.7])}, {"run": runs}
        ... )
        >>> losses = over_seeds(comparison, "eval_loss")
        >>> losses.run.values.tolist(), losses["mean"].values.round(2).tolist()
        (['relora', 'lora'], [3.1, 3.6])
    """
    values = comparison[metric]
    if schema.MATRIX in values.dims:
        layers = comparison["layer"]
        inside = values.isel({schema.MATRIX: np.flatnonzero(layers.values >= 0)})
        values = (
            inside.groupby("layer").mean(schema.MATRIX) if by_layer else inside.mean(schema.MATRIX)
        )
    if SEED not in comparison.coords:
        named = [name.rpartition(f"-{SEED}=") for name in comparison[schema.RUN].values.tolist()]
        if all(found for _, found, _ in named):
            values = values.assign_coords(
                {
                    "setting": (schema.RUN, [setting for setting, _, _ in named]),
                    SEED: (schema.RUN, [seed for _, _, seed in named]),
                }
            )
    return dy.over(values, SEED, level=level)


def _train(run: SweepRun, preset: str, output: Path, text: Path | None, workers: int) -> str | None:
    """Train one run; returns what went wrong, or None."""
    folder = output / run.name
    words = [*train_words(preset, run.config), "--output", str(folder)]
    words += ["--text", str(text)] if text is not None else []
    words += ["--resume"] if (folder / CONFIG_NAME).is_file() else []
    cores = max(1, (os.cpu_count() or 1) // workers)
    environment = {"OMP_NUM_THREADS": str(cores), **os.environ}
    log = output / f"{run.name}.log"
    with log.open("a") as lines:
        command = [sys.executable, "-m", "probes.relora", *words]
        status = subprocess.run(command, stdout=lines, stderr=lines, env=environment).returncode
    if status == 0:
        return None
    said = log.read_text().strip().splitlines()
    return f"{run.name} ended with status {status} ({said[-1] if said else 'no output'}; see {log})"


def _column(runs: Sequence[SweepRun], name: str) -> list[Any]:
    """The values of a varied field: numbers if all are numbers; NaN or "" where a run has none."""
    values = [run.varied[name] for run in runs]
    for kind in (int, float):
        try:
            return [kind(np.nan if value is None else value) for value in values]
        except ValueError:
            continue
    return ["" if value is None else str(value) for value in values]


def _say(line: str) -> None:
    print(f"{line}\n", end="", flush=True)  # in one piece, because several threads print
