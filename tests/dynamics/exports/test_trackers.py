"""What a tracker holds after an export is read back, by other means than those that wrote it."""

import json
import math
import sqlite3
import struct

import numpy as np
import pytest

import dynamics as dy
from dynamics.exports.export import export
from dynamics.exports.series import run_series

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(write_recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = {name: write_recording(folder / f"{name}.zarr", seed=i) for i, name in enumerate("ab")}
    metrics = ["effective_rank", "condition_number"]
    both = dy.compare(runs, metrics=metrics, kinds=["weight", "update"])
    both["condition_number"][0, 0, 0] = np.inf
    return both.assign_coords(lr=("run", [0.1, 0.2]))


@pytest.fixture(scope="module")
def expected(both):
    """(run, key, step) -> the mean over the layers, computed by hand."""
    found = {}
    for metric in ("effective_rank", "condition_number"):
        for run in both.run.values.tolist():
            for kind in both.kind.values.tolist():
                for step in both.step.values.tolist():
                    cells = both[metric].sel(run=run, kind=kind, step=step)
                    for module in set(both.module.values.tolist()):
                        values = cells.values[both.module.values == module]
                        if not np.isnan(values).all():
                            key = f"rank/{kind}/{metric}/{module}"
                            found[run, key, step] = math.fsum(values) / len(values)
    return found


def test_the_series_are_means_over_layers_and_leave_out_what_was_not_measured(both, expected):
    series = run_series(both, "unused")
    found = {
        (run.name, key, step): number
        for run in series
        for step, numbers in run.steps.items()
        for key, number in numbers.items()
    }
    assert found == expected
    assert [run.settings["lr"] for run in series] == [0.1, 0.2]
    one = run_series(dy.select_run(both, "a"), "named")
    assert [run.name for run in one] == ["named"]


def test_tensorboard(both, expected, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "tensorboard --logdir" in export(both, "tensorboard", str(tmp_path / "tb"))
    found = {}
    for run in ("a", "b"):
        events = EventAccumulator(str(tmp_path / "tb" / run), size_guidance={"scalars": 0}).Reload()
        for key in events.Tags()["scalars"]:
            for event in events.Scalars(key):
                found[run, key, event.step] = event.value
    assert found == {key: float(np.float32(value)) for key, value in expected.items()}
    with pytest.raises(dy.DynamicsError, match="has event files already"):
        export(both, "tensorboard", str(tmp_path / "tb"))
    export(both, "tensorboard", str(tmp_path / "tb"), overwrite=True)
    assert len(list((tmp_path / "tb").rglob("events*"))) == 2


def wandb_history(path):
    """The rows of history in a .wandb file: LevelDB's log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            parsed, record = wandb_internal_pb2.Record.FromString(record), b""
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                yield {
                    each.key or "/".join(each.nested_key): json.loads(each.value_json)
                    for each in items
                }


def test_wandb_offline(both, expected, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    wandb.teardown()  # what a test before has left running knows the environment of its own time
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    export(both, "wandb", str(tmp_path / "wb"))
    wandb.teardown()  # its service may still write, also after the runs are finished
    files = sorted((tmp_path / "wb").rglob("*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert len(files) == 2
    found = {}
    for run, file in zip("ab", files, strict=True):
        for row in wandb_history(file):
            for key, value in row.items():
                if key.startswith("rank/") and key != "rank/step":
                    found[run, key, row["rank/step"]] = float(value)
    assert found == expected


def test_trackio(both, expected, tmp_path, monkeypatch):
    folder = tmp_path / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))  # trackio reads it when it is imported
    pytest.importorskip("trackio", reason="needs the extra trackio")
    export(both, "trackio", str(folder), project="ranks")
    rows = sqlite3.connect(folder / "ranks.db").execute(
        "SELECT run_name, step, metrics FROM metrics"
    )
    found = {
        (run, key, step): float(value)
        for run, step, metrics in rows.fetchall()
        for key, value in json.loads(metrics).items()
    }
    assert found == expected
    with pytest.raises(dy.DynamicsError, match="in this process"):
        export(both, "trackio", str(tmp_path / "another"), project="ranks")


def test_mlflow(both, expected, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    store = tmp_path / "mlflow.db"
    export(both, "mlflow", str(store), project="ranks")
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("ranks").experiment_id
    found = {}
    for run in client.search_runs([experiment]):
        assert run.info.status == "FINISHED"
        assert run.data.params["lr"] in ("0.1", "0.2")
        for key in run.data.metrics:
            for each in client.get_metric_history(run.info.run_id, key):
                found[run.info.run_name, key, each.step] = each.value
    finite = {k: min(value, np.finfo(float).max) for k, value in expected.items()}
    assert found == finite
