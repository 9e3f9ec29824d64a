"""What trackers have stored, read back offline: step -> key -> value."""

import json
import struct
from pathlib import Path


def of_tensorboard(folder, prefix=""):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in Path(folder).rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag.startswith(f"{prefix}rank/"):
                for each in events.Scalars(tag):
                    values = found.setdefault(each.step, {})
                    key = tag.removeprefix(prefix)
                    assert key not in values, f"{key} was shown twice at step {each.step}"
                    values[key] = each.value
    return found


def rows_of_wandb(folder):
    """The rows of the history of an offline run, in their order."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.finish()
    wandb.teardown()  # its service may still write, also after finish()
    (file,) = Path(folder).rglob("run-*.wandb")
    rows = []
    for data in _of_leveldb(file.read_bytes()[7:]):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def of_wandb(folder, prefix="", step="rank/step"):
    found = {}
    for row in rows_of_wandb(folder):
        values = {
            key.removeprefix(prefix): value
            for key, value in row.items()
            if key.startswith(f"{prefix}rank/") and key != "rank/step"
        }
        if values:
            assert row[step] not in found, f"two rows of step {row[step]}"
            found[row[step]] = values
    return found


def _of_leveldb(data):
    """The records of a LevelDB log whose first block begins after a header of 7 bytes."""
    position, whole = 7, b""
    while position < len(data) + 7:
        if position % 32768 > 32768 - 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position - 7)
        whole += data[position : position + length]
        position += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def of_trackio(folder):
    import sqlite3

    (file,) = Path(folder).glob("*.db")
    found = {}
    with sqlite3.connect(file) as database:
        for step, values in database.execute("select step, metrics from metrics"):
            text = values.decode() if isinstance(values, bytes) else values
            live = {k: v for k, v in json.loads(text).items() if k.startswith("rank/")}
            if live:
                found.setdefault(step, {}).update(live)
    return found
