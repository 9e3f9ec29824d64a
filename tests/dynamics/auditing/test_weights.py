"""Weights, gradients and files of written recordings, whose defects are known."""

import shutil

import numpy as np
import pytest

import dynamics as dy
from dynamics.auditing import Severity
from tests.dynamics.auditing.written_runs import (
    NAMES,
    audited,
    failed,
    failed_checks,
    write_relora_run,
)


def test_adapters_that_are_zero_are_named_with_their_records():
    def empty(step, name, factor):
        if name == NAMES[1] and step <= 10:
            factor[:] = 0

    report = audited(A=empty, B=empty)
    (verdict,) = failed(report, "dead_adapter")
    assert (verdict.matrix, verdict.step, verdict.measured) == (NAMES[1], 0, 3)
    assert "in 3 records (steps 0 to 10)" in verdict.meaning


def test_a_parameter_whose_gradient_is_always_zero_is_named():
    def dead(step, name, gradient):
        if name == NAMES[2] or step == 5:  # one record alone is no defect
            gradient[:] = 0

    report = audited(gradient=dead)
    assert failed_checks(report) == {"zero_gradient"}
    assert [each.matrix for each in failed(report, "zero_gradient")] == [NAMES[2]]


@pytest.mark.parametrize(
    ("layer", "first_step", "severity", "share"),
    [(1, 0, Severity.FAIL, 1), (0, 0, Severity.WARN, 1), (1, 20, Severity.WARN, 3 / 7)],
    ids=["always", "from-the-first-layer", "for-a-while"],
)
def test_a_weight_that_rests_while_its_module_changes(layer, first_step, severity, share):
    at_rest = []

    def freeze(step, name, weight):
        if name == NAMES[layer] and step >= first_step:
            at_rest.append(at_rest[0] if at_rest else weight.copy())
            weight[:] = at_rest[0]

    report = audited(merges=(), weight=freeze)
    verdicts = {each.matrix: each for each in report.of("frozen_layer")}
    assert verdicts[NAMES[layer]].severity is severity
    assert verdicts[NAMES[layer]].measured == pytest.approx(share)
    assert verdicts[NAMES[layer]].threshold == 0
    assert verdicts[NAMES[2]].severity is Severity.PASS


def test_a_displacement_of_more_rank_than_its_cycles_is_named():
    def grow(step, name, weight):
        if name == NAMES[0] and step == 15:
            weight += np.float32(0.01) * np.eye(*weight.shape, dtype=np.float32)

    options = {"steps": range(0, 20, 5), "merges": (10,)}
    report = audited(**options)
    assert [each.severity for each in report.of("rank_bound")] == [Severity.PASS] * 3
    report = audited(weight=grow, **options)
    (verdict,) = failed(report, "rank_bound")
    assert (verdict.matrix, verdict.step) == (NAMES[0], 15)
    assert "more than cycles · r = 8 directions" in verdict.meaning


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_one_number_that_is_not_finite_is_named_with_its_place(kind, value):
    def spoil(step, name, matrix):
        if (step, name) == (15, NAMES[0]):
            matrix[2, 3] = value

    report = audited(**{kind: spoil})
    assert failed_checks(report) == {"finite"}
    (verdict,) = failed(report, "finite")
    assert (verdict.matrix, verdict.step) == (NAMES[0], 15)
    assert f"first in {kind} at step 15" in verdict.meaning


def test_an_infinite_logged_value_is_named_and_nan_means_not_logged():
    def scalars(step):
        return {"loss": np.inf if step in (10, 20) else 5.0, "tokens_per_second": np.nan}

    report = audited(scalars=scalars)
    (verdict,) = failed(report, "finite")
    assert (verdict.matrix, verdict.step, verdict.measured) == (None, 10, 2)
    assert verdict.meaning == "The logged loss is infinite in 2 records."


def test_a_damaged_chunk_is_named_and_the_rest_is_audited(tmp_path):
    run = write_relora_run(tmp_path / "run.zarr", steps=range(0, 20, 5))
    chunk = run / "weight" / NAMES[0] / "c" / "3" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    report = dy.audit(run)
    assert failed_checks(report) == {"readable"}
    assert f"weight/{NAMES[0]} in record 3" in report.of("readable")[0].meaning


def test_a_damaged_checkpoint_is_named(llama_checkpoints, tmp_path):
    shutil.copytree(llama_checkpoints, tmp_path / "run")
    path = tmp_path / "run/checkpoint-4/model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    report = dy.audit(tmp_path / "run")
    assert failed_checks(report) == {"readable"}
    assert [each.step for each in report.of("readable")] == [4]
