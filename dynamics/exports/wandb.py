"""Weights & Biases: a run for each run, online or offline as W&B is set up."""

from pathlib import Path

from dynamics.errors import DynamicsError, one_line, require_extra
from dynamics.exports.series import RunSeries
from dynamics.runs.run import abridged

_STEP = "rank/step"


def to_wandb(runs: list[RunSeries], output: Path | None, project: str) -> str:
    """Log the runs to W&B; returns where they are.

    Args:
        runs: what `run_series` returned.
        output: the folder of W&B's local files, W&B's own by default.
        project: of W&B.

    Raises:
        DynamicsError: wandb is not installed, or refuses: nobody is logged in, ...
    """
    try:
        import wandb
    except ImportError as error:
        raise require_extra("wandb", error) from error
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    places = []
    try:
        for each in runs:
            run = wandb.init(
                project=project,
                name=each.name,
                config=each.settings,
                dir=output,
                reinit="create_new",
            )
            # A step of their own: with `step=`, W&B drops what comes late.
            run.define_metric(_STEP)
            run.define_metric("rank/*", step_metric=_STEP)
            for step, numbers in each.steps.items():
                run.log(numbers | {_STEP: step})
            places.append(run.url or str(Path(run.dir).parent))
            run.finish()
    except (wandb.errors.Error, OSError) as error:
        raise DynamicsError(
            f"W&B says: {one_line(error)}. Log in with 'wandb login', or set WANDB_MODE=offline."
        ) from error
    return f"Logged to {abridged(places, 3)}"
