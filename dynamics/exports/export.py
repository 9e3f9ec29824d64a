"""export(): a result to a file or a tracker."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, local_path, near
from dynamics.exports.arrow_files import write_arrow, write_parquet
from dynamics.exports.csv_file import write_csv
from dynamics.exports.files import write_file
from dynamics.exports.frame import to_frame
from dynamics.exports.json_file import write_json
from dynamics.exports.mlflow import to_mlflow
from dynamics.exports.series import run_series
from dynamics.exports.tensorboard import to_tensorboard
from dynamics.exports.trackio import to_trackio
from dynamics.exports.wandb import to_wandb
from dynamics.metrics.modules import metric_names

FILES: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "csv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "json": write_json,
}
TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")
PROJECT = "learning-dynamics"


def export(
    dataset: xr.Dataset,
    to: str,
    output: str | None = None,
    *,
    stem: str = "result",
    spectra: bool = False,
    metrics: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    project: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write a result into a file, or log it to a tracker; returns a line that says where it is.

    A file holds the table of `to_frame`. A tracker gets a run for each run, and for each metric,
    kind and module the mean over its layers along steps, see `run_series`.

    Args:
        dataset: what `analyze`, `compare` or `difference` returned.
        to: "csv", "parquet", "arrow", "json", "wandb", "tensorboard", "trackio" or "mlflow".
        output: a file; for trackers a folder, and for MLflow also a URI. By default STEM.csv, ...,
            STEM.tensorboard, and where the other trackers keep their runs.
        stem: how names without `output` begin, and the name of a run that has none.
        spectra: whether a file gets the singular values, too.
        metrics: only these; all that the result has by default.
        kinds: likewise.
        project: of W&B and trackio, the experiment of MLflow; "learning-dynamics" by default.
        overwrite: whether a file, or TensorBoard's event files, may be replaced.

    Raises:
        OutputExistsError: the output exists.
        MissingError: the result does not have what is asked for.
        DynamicsError: there is no such target, or it does not take what is given; a package is not
            installed, and which extra brings it.

    Example:
        >>> from dynamics.exports.export import export
        >>> export(dy.analyze("run.zarr", kinds=["weight"]), "csv", "weights.csv")
        'Saved to weights.csv'
    """
    targets = (*FILES, *TRACKERS)
    if to not in targets:
        raise DynamicsError(f"No target {to!r}{near(to, targets)}; known: {', '.join(targets)}.")
    if spectra and to in TRACKERS:
        raise DynamicsError(f"--spectra is for files ({', '.join(FILES)}); {to} takes means.")
    if project is not None and to in (*FILES, "tensorboard"):
        raise DynamicsError(f"--project has no effect on --to {to}; leave it out.")
    if output is not None and to != "mlflow":  # whose store may be a server
        local_path(output)
    dataset = _chosen(dataset, metrics, kinds)
    if to in FILES:
        path = Path(output or f"{stem}.{to}")
        write_file(to_frame(dataset, spectra=spectra), path, FILES[to], overwrite=overwrite)
        return f"Saved to {path}"
    runs = run_series(dataset, stem)
    if to == "tensorboard":
        return to_tensorboard(runs, Path(output or f"{stem}.tensorboard"), overwrite=overwrite)
    if to == "mlflow":
        return to_mlflow(runs, output, project or PROJECT)
    log = {"wandb": to_wandb, "trackio": to_trackio}[to]
    return log(runs, None if output is None else Path(output), project or PROJECT)


def _chosen(
    dataset: xr.Dataset, metrics: Iterable[str] | None, kinds: Iterable[str] | None
) -> xr.Dataset:
    has = metric_names(dataset)
    metrics = None if metrics is None else list(metrics)
    for metric in metrics or ():
        if metric not in has:
            raise MissingError(
                f"No metric {metric!r}{near(metric, has)} in this result; it has {', '.join(has)}."
            )
    known = dataset[schema.KIND].values.tolist() if schema.KIND in dataset else []
    kinds = None if kinds is None else list(kinds)
    for kind in kinds or ():
        if kind not in known:
            raise MissingError(
                f"No kind {kind!r}{near(kind, known)} in this result; it has {', '.join(known)}."
            )
    if metrics is not None:
        dataset = dataset.drop_vars([name for name in has if name not in metrics])
    return dataset if kinds is None else dataset.sel({schema.KIND: list(dict.fromkeys(kinds))})
