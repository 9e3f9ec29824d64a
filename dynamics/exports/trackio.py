"""trackio: a run for each run, in its local database."""

import os
from pathlib import Path

from dynamics.errors import DynamicsError, require_extra
from dynamics.exports.series import RunSeries

_FOLDER = "TRACKIO_DIR"


def to_trackio(runs: list[RunSeries], output: Path | None, project: str) -> str:
    """Log the runs to trackio; returns how they are shown.

    Args:
        runs: what `run_series` returned.
        output: the folder of its database, trackio's own by default.
        project: of trackio.

    Raises:
        DynamicsError: trackio is not installed, or has another folder in this process already.
    """
    if output is not None:
        os.environ[_FOLDER] = str(output.resolve())
    try:
        import trackio
        from trackio import utils
    except ImportError as error:
        raise require_extra("trackio", error) from error
    if output is not None and Path(utils.TRACKIO_DIR).resolve() != output.resolve():
        raise DynamicsError(
            f"trackio uses the folder {utils.TRACKIO_DIR} in this process; leave the output out."
        )
    for each in runs:
        trackio.init(
            project=project,
            name=each.name,
            config=each.settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        for step, numbers in each.steps.items():
            trackio.log(numbers, step=step)
        trackio.finish()
    shown = "" if output is None else f"{_FOLDER}={output} "
    return f"Logged to {utils.TRACKIO_DIR}; see it with: {shown}trackio show --project {project}"
