"""Records of a run that are those of another run."""

import json

import pytest

import dynamics as dy
from dynamics.auditing import Severity, audit
from tests.dynamics.auditing.test_order import saved, trained

STEPS = list(range(0, 1000, 100))


def against(tmp_path, weights, other):
    (tmp_path / "other").mkdir()
    return audit(saved(tmp_path, weights), against=[saved(tmp_path / "other", other)])


def found(tmp_path, weights, other):
    return against(tmp_path, weights, other).of("distinct_runs")


def test_two_runs_are_apart(tmp_path):
    (verdict,) = found(tmp_path, trained(STEPS), trained(STEPS, seed=1))
    assert verdict.severity is Severity.PASS


def test_a_record_of_the_other_run_is_named(tmp_path):
    weights, other = trained(STEPS), trained(STEPS, seed=1)
    weights[300] = other[300]
    (verdict,) = found(tmp_path, weights, other)
    assert (verdict.severity, verdict.step, verdict.measured) == (Severity.FAIL, 300, 2)
    assert "in 2 of 2 matrices" in verdict.meaning


def test_a_run_may_fork_from_another_one(tmp_path):
    weights, other = trained(STEPS), trained(STEPS, seed=1)
    other |= {step: weights[step] for step in (0, 100, 200)}
    (verdict,) = found(tmp_path, weights, other)
    assert verdict.severity is Severity.PASS
    assert "both share: 0, 100, 200" in verdict.meaning


def test_a_run_may_continue_another_one(tmp_path):
    weights, other = trained(STEPS), trained(STEPS, seed=1)
    weights[0] = other[900]
    (verdict,) = found(tmp_path, weights, other)
    assert verdict.severity is Severity.PASS


def test_a_copy_of_a_run_is_none(tmp_path):
    (verdict,) = found(tmp_path, trained(STEPS), trained(STEPS))
    assert verdict.severity is Severity.FAIL
    assert "is a copy of the other" in verdict.meaning


def test_runs_without_a_common_matrix_are_not_compared(tmp_path):
    run = saved(tmp_path, trained(STEPS))
    (tmp_path / "other").mkdir()
    other = saved(tmp_path / "other", {0: trained(STEPS)[0]})
    (verdict,) = audit(other, against=[run]).of("distinct_runs")
    assert verdict.severity is Severity.NOT_CHECKED
    with pytest.raises(dy.DynamicsError, match="--hashes"):
        audit(run, hashes_only=True, against=[other])


def test_the_command_takes_several(tmp_path):
    from typer.testing import CliRunner

    from dynamics.cli.app import app

    run = saved(tmp_path, trained(STEPS))
    words = ["audit", str(run), "--json"]
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        words += ["--against", str(saved(tmp_path / str(seed), trained(STEPS, seed=seed)))]
    done = CliRunner().invoke(app, words)
    verdicts = json.loads(done.stdout)["verdicts"]
    severities = [each["severity"] for each in verdicts if each["check"] == "distinct_runs"]
    assert (done.exit_code, severities) == (1, ["fail", "pass"])
