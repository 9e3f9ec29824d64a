"""Values read back from the trackers equal `analyze` of the recording of the same run."""

from functools import partial

import numpy as np
import pytest

from probes.live.trackers import WandB, tracker_of
from tests.probes.live import reading
from tests.probes.live.training import expected, train


def in_float32(values):
    """TensorBoard stores float32 by default."""
    return {
        step: {key: float(np.float32(value)) for key, value in each.items()}
        for step, each in values.items()
    }


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B without a server, in a folder of its own."""
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    wandb.teardown()  # what a test before has left running knows the environment of its own time
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # it would stay in front of this process's output
    yield wandb
    wandb.finish()
    wandb.teardown()  # or the next test would write to this folder


def test_tensorboard_has_the_values_of_analyze(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path / "log") as writer:
        log = partial(writer.add_scalar, "loss")
        train(tmp_path / "run.zarr", writer.add_scalar, after_step=lambda t, loss: log(loss, t))
    assert reading.of_tensorboard(tmp_path / "log") == in_float32(expected(tmp_path / "run.zarr"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["counted", "with steps", "rarely", "alone", "function"])
def test_wandb_has_the_values_of_analyze_and_keeps_the_others(tmp_path, offline, way):
    """Whatever you log, and however: nothing of yours is dropped, and nothing of ours."""
    with offline.init(project="test") as run:

        def log(step, loss):
            if way in ("counted", "function"):
                run.log({"loss": loss})
                run.log({"step": step})
            elif way == "with steps" or (way == "rarely" and step % 5 == 0):
                run.log({"loss": loss, "step": step}, step=step)

        to = offline.log if way == "function" else run.log
        train(tmp_path / "run.zarr", to, steps=10, every=1, after_step=log)
    assert reading.of_wandb(tmp_path) == expected(tmp_path / "run.zarr")
    rows = reading.rows_of_wandb(tmp_path)
    steps = [row["step"] for row in rows if "step" in row]
    assert steps == {"alone": [], "rarely": [5, 10]}.get(way, list(range(1, 11)))
    assert sum("loss" in row for row in rows) == len(steps)


@pytest.mark.slow
def test_wandb_that_has_not_begun_is_told_of(tmp_path, offline):
    with pytest.warns(UserWarning, match=r"W&B has no active run: call wandb.init\(\) first"):
        train(tmp_path / "run.zarr", offline.log)


@pytest.mark.slow
def test_an_alarm_is_an_alert_of_wandb(tmp_path, offline):
    alerts = []
    with offline.init(project="test") as run:
        run.alert = lambda **alert: alerts.append(alert)
        tracker_of(run.log).alarm("weight/a holds NaN or Inf.", 3)
    assert alerts == [
        {"title": "A check of the recorded training failed", "text": "weight/a holds NaN or Inf."}
    ]
    assert isinstance(tracker_of(run.log), WandB)


def test_trackio_has_the_values_of_analyze(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="needs trackio")
    trackio.init(project="test", name="run", embed=False)
    train(
        tmp_path / "run.zarr", trackio.log, after_step=lambda t, loss: trackio.log({"loss": loss})
    )
    trackio.finish()
    assert reading.of_trackio(tmp_path / "trackio") == expected(tmp_path / "run.zarr")


@pytest.mark.slow
def test_mlflow_has_the_values_of_analyze(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    with mlflow.start_run() as run:
        log = partial(mlflow.log_metric, "loss")
        train(tmp_path / "run.zarr", mlflow.log_metrics, after_step=lambda t, loss: log(loss, t))
    client = mlflow.MlflowClient()
    found = {}
    for key in client.get_run(run.info.run_id).data.metrics:
        if key.startswith("rank/"):
            for each in client.get_metric_history(run.info.run_id, key):
                found.setdefault(each.step, {})[key] = each.value
    assert found == expected(tmp_path / "run.zarr")
