"""Verdicts on live measurements and logged values, from events whose numbers are known."""

import pytest

import dynamics as dy
from dynamics.auditing import Severity, events
from dynamics.recordings import RecordingWriter
from dynamics.runs.run import Event
from tests.dynamics.auditing.written_runs import audited

MERGE = {"tolerance": 1e-6, "worst_scaling": 2.0, "worst_layer": "up_proj"}
RESET = {"zero_exp_avg": 1.0, "zero_exp_avg_sq": 1.0, "momentum_without_variance": 0.0}


@pytest.mark.parametrize(
    ("change", "scale", "severity", "meaning"),
    [
        (1e-6, 1.0, Severity.PASS, "W_eff was the same"),
        (0.5, 0.5, Severity.FAIL, "(scale 0.5): the merge forgot the scale s = 2"),
        (1.0, 1.0, Severity.FAIL, "the update counts twice"),
    ],
)
def test_a_merge_is_judged_by_the_change_of_the_effective_weight(change, scale, severity, meaning):
    facts = MERGE | {"relative_change": change, "scale": scale}
    verdict = events.merge_verdict(6, facts)
    assert (verdict.severity, verdict.matrix, verdict.step) == (severity, "up_proj", 6)
    assert (verdict.measured, verdict.threshold) == (change, 1e-6)
    assert meaning in verdict.meaning


@pytest.mark.parametrize(
    ("facts", "severities"),
    [
        ({}, ("pass", "pass")),
        ({"zero_exp_avg": 0.4}, ("fail", "pass")),
        ({"zero_exp_avg": 0.4, "reset_share": 0.4}, ("pass", "pass")),
        ({"zero_exp_avg_sq": 0.4, "reset_share": 0.5}, ("fail", "pass")),
        ({"momentum_without_variance": 1e-3, "worst_parameter": "up_proj"}, ("pass", "fail")),
    ],
)
def test_a_reset_is_judged_by_what_it_left(facts, severities):
    reset, moments = events.optimizer_verdicts(6, RESET | facts)
    assert (reset.severity, moments.severity) == severities
    emptied = min(facts.get("zero_exp_avg", 1), facts.get("zero_exp_avg_sq", 1))
    assert (reset.measured, reset.threshold) == (1 - emptied, 1 - facts.get("reset_share", 1))
    assert (moments.matrix, moments.threshold) == (facts.get("worst_parameter"), 0)


def test_the_facts_of_merge_events_are_judged():
    facts = MERGE | {"relative_change": 0.5, "scale": 0.5}
    report = audited(event_attrs=facts)
    assert [(each.step, each.severity) for each in report.of("live_merge")] == [
        (step, Severity.FAIL) for step in (10, 20, 30)
    ]


def test_events_without_facts_are_not_checked_and_say_why():
    report = audited()
    (live_merge,) = report.of("live_merge")
    assert live_merge.severity is Severity.NOT_CHECKED
    assert "the merge events hold no live measurements" in live_merge.meaning
    for check in ("optimizer_reset", "moments"):
        (verdict,) = report.of(check)
        assert verdict.meaning == "the run has no optimizer_reset events"


@pytest.mark.parametrize(
    ("after", "severity"), [(0.1, Severity.PASS), (0.5, Severity.PASS), (0.6, Severity.WARN)]
)
def test_a_learning_rate_that_does_not_restart_is_a_warning(tmp_path, after, severity):
    writer = RecordingWriter(tmp_path / "run.zarr", {})
    for step in range(3):
        writer.append(step, {}, scalars={"learning_rate": 1.0 if step < 2 else after})
    writer.event(Event(1, "optimizer_reset", {}))
    (verdict,) = events.judge_learning_rate(dy.open_run(tmp_path / "run.zarr"))
    assert (verdict.severity, verdict.step) == (severity, 1)
    assert (verdict.measured, verdict.threshold) == (after, 0.5)


def test_the_loss_is_reported_across_merges_and_elsewhere():
    losses = dict(zip(range(0, 40, 5), (5.0, 4.5, 4.0, 4.25, 4.375, 4.0, 3.5, 3.0), strict=True))
    (verdict,) = audited(merges=(10,), scalars=lambda step: {"loss": losses[step]}).of(
        "loss_at_merges"
    )
    assert (verdict.severity, verdict.step, verdict.measured) == (Severity.PASS, 10, 0.25)
    assert "at most +0.25 across merges and by at most +0.125 elsewhere" in verdict.meaning
