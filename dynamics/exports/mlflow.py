"""MLflow: a run for each run, in its tracking store."""

import re
import time
from itertools import islice

from dynamics.errors import DynamicsError, one_line, require_extra
from dynamics.exports.series import RunSeries

_AT_ONCE = 1000  # metrics that MLflow takes in one call
_LONGEST = 6000  # characters of a parameter's value


def to_mlflow(runs: list[RunSeries], output: str | None, project: str) -> str:
    """Log the runs to MLflow; returns where they are.

    Infinity becomes 1.8e308: MLflow's stores hold finite numbers. What MLflow takes in no name
    becomes "_".

    Args:
        runs: what `run_series` returned.
        output: the URI of a tracking store, or the path of an SQLite file; by default that of
            MLFLOW_TRACKING_URI.
        project: MLflow's experiment.

    Raises:
        DynamicsError: mlflow is not installed, or its store refuses.
    """
    try:
        import mlflow
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise require_extra("mlflow", error) from error
    if output is not None:
        mlflow.set_tracking_uri(output if "://" in output else f"sqlite:///{output}")
    uri = mlflow.get_tracking_uri()
    try:
        client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(project).experiment_id
        for each in runs:
            run = client.create_run(experiment, run_name=each.name).info.run_id
            settings = [Param(_name(k), str(v)[:_LONGEST]) for k, v in each.settings.items()]
            client.log_batch(run, params=settings)
            now = int(time.time() * 1000)
            metrics = (
                Metric(_name(key), number, now, step)
                for step, numbers in each.steps.items()
                for key, number in numbers.items()
            )
            while batch := list(islice(metrics, _AT_ONCE)):
                client.log_batch(run, metrics=batch)
            client.set_terminated(run)
    except (MlflowException, OSError) as error:
        raise DynamicsError(f"MLflow says of {uri}: {one_line(error)}.") from error
    return f"Logged to {uri}; see it with: mlflow ui --backend-store-uri {uri}"


def _name(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)
