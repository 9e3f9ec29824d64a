"""The demo: trains two twins, measures their recordings and checkpoints, and compares them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr

import dynamics as dy
from dynamics import schema
from dynamics.cli.output import print_line, print_table
from dynamics.cli.tables import summary_table
from dynamics.errors import OutputExistsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora.config import TrainConfig
from probes.relora.data.text import folder_text, prepare_data, standard_library_text
from probes.relora.figures import draw
from probes.relora.presets import micro
from probes.relora.training.run_directory import RECORDING_NAME
from probes.relora.training.trainer import train

METHODS = ("full_rank", "relora")
CHECKPOINTS = "checkpoints"


def demo_config(seed: int = 0) -> TrainConfig:
    """The micro preset with 300 steps and four merges: about a minute on two CPU cores."""
    return replace(
        micro(),
        seed=seed,
        learning_rate=1e-3,
        other_learning_rate=0.0,
        max_steps=300,
        warmup_steps=30,
        restart_warmup_steps=5,
        reset_every=60,
        evaluate_every=60,
        save_every=60,
    )


def run_demo(output: Path, config: TrainConfig, text: Path | None = None) -> xr.Dataset:
    """Train both twins into `output`, measure and compare them, and print where everything lies.

    output/METHOD/run.zarr            recording, METHOD being full_rank or relora
    output/METHOD/checkpoints/        checkpoints of the Trainer
    output/recordings.zarr            the comparison, measured from the recordings
    output/checkpoints.zarr           the same from the checkpoints
    output/figures/*.png

    Args:
        output: a folder that does not exist or is empty.
        config: the run; its `method` is set for each twin.
        text: folder of .txt files; the standard library's sources by default.

    Returns:
        The comparison measured from the recordings.

    Raises:
        OutputExistsError: `output` is not empty.
        DynamicsError: the text is missing or too short.
    """
    if output.exists() and any(output.iterdir()):
        raise OutputExistsError(f"{output} is not empty; give a new folder, or remove it first.")
    texts = standard_library_text() if text is None else folder_text(text)
    data = prepare_data(texts, config)
    print_line(
        f"{sum(map(len, texts)) / 1e6:.1f} M characters of {text or 'Python source'}, "
        f"{len(data.train) * config.sequence_length / 1e6:.2f} M training tokens"
    )
    for method in METHODS:
        print_line(f"Training {method}: {config.max_steps} steps")
        twin = replace(config, method=method)
        store = output / method / RECORDING_NAME
        recorder = RecorderCallback(store, every=config.record_every, if_exists="refuse")
        train(
            twin,
            data,
            output / method / CHECKPOINTS,
            callbacks=[recorder],
            on_event=recorder.event,
        )
    print_line("Measuring the recordings and the checkpoints")
    recordings = dy.compare({method: output / method / RECORDING_NAME for method in METHODS})
    checkpoints = dy.compare({method: output / method / CHECKPOINTS for method in METHODS})
    dy.save(recordings, output / "recordings.zarr")
    dy.save(checkpoints, output / "checkpoints.zarr")
    figures = draw(recordings, output / "figures")

    print_table(summary_table(recordings))
    print_line(_losses(recordings))
    print_line(_agreement(recordings, checkpoints))
    for method in METHODS:
        verdict = dy.audit(output / method / RECORDING_NAME).line
        print_line(f"Audit of {method}: {verdict}")
    for path in (*(output / method for method in METHODS), output / "recordings.zarr"):
        print_line(f"  {path}")
    print_line(f"  {output / 'checkpoints.zarr'}")
    for path in figures:
        print_line(f"  {path}")
    return recordings


def _losses(comparison: xr.Dataset) -> str:
    lines = []
    for method in METHODS:
        of_run = comparison.sel(run=method)
        losses = {
            name: of_run[name].dropna("step").values
            for name in ("loss", "eval_loss")
            if name in of_run
        }
        shown = ", ".join(f"{name} {each[0]:.3f} → {each[-1]:.3f}" for name, each in losses.items())
        events = json.loads(dy.select_run(comparison, method).attrs["events"])
        merges = sum(event["kind"] == schema.MERGE for event in events)
        lines.append(f"{method}: {shown}; {merges} merges")
    return "\n".join(lines)


def _agreement(recordings: xr.Dataset, checkpoints: xr.Dataset) -> str:
    """How much the two ways of measuring the same steps differ."""
    one, other = xr.align(recordings["spectral_norm"], checkpoints["spectral_norm"], join="inner")
    one, other = (each.sel(kind=["weight"]) for each in (one, other))
    apart = np.nanmax(np.abs(one - other) / one)
    return (
        f"Recordings and checkpoints agree: spectral norms of the weights at the same steps are "
        f"within {apart:.1e} of each other (relative)."
    )
