"""Public histories that were no histories, rebuilt: each is named by its check, and no other."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.auditing import Severity
from tests.dynamics.auditing.test_beginning import beside, drawn
from tests.dynamics.auditing.test_order import trained

pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")

pytestmark = pytest.mark.slow
STEPS = range(0, 2000, 100)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMES = [f"gpt_neox.layers.{i}.attention.dense.weight" for i in range(2)]
CHECKS = ("distinct_checkpoints", "ordered_history", "step_zero", "distinct_runs")


def files_of(weight, note=""):
    """The files of a model of two shards; a note makes other bytes of the same numbers."""
    tensors = {name: (weight * (1 - 2 * i)).astype(np.float32) for i, name in enumerate(NAMES)}
    files = {
        file: safetensors.save({name: tensors[name]}, {"note": note})
        for file, name in zip(SHARDS, NAMES, strict=True)
    }
    index = {"weight_map": dict(zip(NAMES, SHARDS, strict=True))}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files["config.json"] = b'{"model_type": "gpt_neox"}'
    return files


def push(hub, tmp_path, files, name="org/run"):
    """A history of files by step; returns its address."""
    for step, each in files.items():
        folder = tmp_path / name / f"step{step}"
        folder.mkdir(parents=True)
        for file, content in each.items():
            (folder / file).write_bytes(content)
        hub.repo(name).push(folder, f"step{step}")
    return f"hf://{name}"


def healthy(seed=0):
    return {step: files_of(weight) for step, weight in trained(list(STEPS), seed=seed).items()}


def named(report):
    """(check, step) of all that is no pass."""
    return {
        (each.check, each.step)
        for each in report.verdicts
        if each.check in CHECKS and each.severity is not Severity.PASS
    }


def last_weights(files, weights):  # pythia-2.8b: 76 of 154 branches; OLMo-2 7B: 3
    for step in (300, 700, 1100):
        files[step] = files[1900]


def other_bytes(files, weights):  # pythia-2.8b: 10 more, which share their embeddings only
    for step in (300, 700):
        files[step] = files_of(weights[1900], f"converted for {step}")


def one_shard(files, weights):  # pythia-12b: the first of three
    files[500] = {**files[500], SHARDS[0]: files[1900][SHARDS[0]]}


def at_rest(files, weights):  # neox checkpoints of pythia-2.8b: steps 0 to 6300
    files[800] = files[700]


def late_step(files, weights):  # pythia-12b-deduped: another, late checkpoint
    files[400] = files_of(beside(weights[1600]))


def other_start(files, weights):  # runs of pythia's weight seeds: step 0 is of another seed
    files[0] = files_of(drawn())


def trained_start(files, weights):
    files[0] = files_of(beside(weights[1200]))


def start_at_the_end(files, weights):
    files[1900] = files_of(drawn())


def exchanged(files, weights):
    files[900], files[1000] = files[1000], files[900]


def first_rate_of_zero(files, weights):  # all of pythia: nothing is wrong
    files[1] = files[0]


@pytest.mark.parametrize(
    ("corrupt", "by_hashes", "by_numbers"),
    [
        (last_weights, {("distinct_checkpoints", 300)}, {("distinct_checkpoints", 300)}),
        (other_bytes, set(), {("distinct_checkpoints", 300)}),
        (one_shard, {("distinct_checkpoints", 500)}, {("distinct_checkpoints", 500)}),
        (at_rest, {("distinct_checkpoints", 800)}, {("distinct_checkpoints", 800)}),
        (late_step, set(), {("ordered_history", 400)}),
        (other_start, set(), {("step_zero", 0)}),
        (trained_start, set(), {("step_zero", 0)}),
        (start_at_the_end, set(), {("step_zero", 1900)}),
        (exchanged, set(), {("ordered_history", 900)}),
        (first_rate_of_zero, set(), set()),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_corruption_is_named_by_its_check(hub, tmp_path, corrupt, by_hashes, by_numbers):
    files, weights = healthy(), trained(list(STEPS))
    corrupt(files, weights)
    run = dy.open_run(push(hub, tmp_path, files))
    assert named(dy.audit(run, hashes_only=True)) == by_hashes
    found = named(dy.audit(run))
    # A copy of a later step also lies far off: the same step, named twice.
    assert found - {("ordered_history", step) for step in (300, 500, 700, 1100)} == by_numbers


def test_records_of_another_run_are_named_by_hashes(hub, tmp_path):
    files, other = healthy(), healthy(seed=1)
    files[900] = other[1300]
    run = push(hub, tmp_path, files)
    against = [push(hub, tmp_path, other, "org/other")]
    report = dy.audit(run, hashes_only=True, against=against)
    assert named(report) == {("distinct_runs", 900)}
    (found,) = report.of("distinct_runs")
    assert "step 1300 of hf://org/other in 2 of 2 matrices" in found.meaning
    report = dy.audit(run, against=against)
    assert {check for check, _ in named(report)} == {"distinct_runs", "ordered_history"}


def test_runs_that_share_their_beginning_are_apart(hub, tmp_path):
    """Pythia's seeds of the data share step 0; step 1 differs in the signs of zeros."""
    files, other = healthy(), healthy(seed=1)
    other |= {step: files[step] for step in (0, 100, 200)}
    run = push(hub, tmp_path, files)
    against = [push(hub, tmp_path, other, "org/other")]
    for hashes_only in (True, False):
        (found,) = dy.audit(run, hashes_only=hashes_only, against=against).of("distinct_runs")
        assert found.severity is Severity.PASS
        assert "the beginning that both share: 0, 100, 200" in found.meaning


def test_a_missing_shard_is_no_history_to_read(hub, tmp_path):
    files = healthy()
    del files[500][SHARDS[1]]
    report = dy.audit(push(hub, tmp_path, files))
    assert {each.check for each in report.verdicts if each.severity is Severity.FAIL} == {
        "readable"
    }
