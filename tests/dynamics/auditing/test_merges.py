"""Merges, resets and bases of written recordings, whose defects are known."""

import numpy as np
import pytest

from dynamics.auditing import Severity
from dynamics.auditing.merges import named_scale
from tests.dynamics.auditing.written_runs import (
    NAMES,
    SCALING,
    audited,
    failed,
    failed_checks,
    severities,
)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]
)
def test_a_faithful_recording_passes_with_and_without_events(seed):
    report = audited(seed=seed, events=seed % 2 == 0)
    assert failed_checks(report) == set()
    assert severities(report)["merge_fidelity"] is Severity.PASS
    assert severities(report)["adapter_reset"] is Severity.PASS
    # The bound is near the residual: a threshold that is orders above it would detect nothing.
    for merge in report.of("merge_fidelity"):
        assert merge.measured < merge.threshold < 1e-4


@pytest.mark.parametrize("events", [True, False])
def test_a_merge_without_its_scale_is_named_with_and_without_events(events):
    merges = audited(events=events, merged=lambda update: update / SCALING).of("merge_fidelity")
    assert len(merges) == 9
    assert all("forgot the scale s = 2" in each.meaning for each in merges)
    assert all(each.measured == pytest.approx(0.5, rel=1e-4) for each in merges)


@pytest.mark.parametrize(("factor", "detected"), [(1 + 3e-4, True), (1 + 1e-7, False)])
def test_a_merge_error_is_detected_down_to_a_few_times_the_rounding(factor, detected):
    # Between float32 rounding and what TF32 products would explain, it is a warning.
    report = audited(merged=lambda update: np.float32(factor) * update)
    severity = severities(report)["merge_fidelity"]
    assert (severity in (Severity.WARN, Severity.FAIL)) is detected


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ((12,), "there is no record at the merge step 12"),
        ((10, 12), "2 merges lie between the records 10 and 15"),
    ],
)
def test_merges_that_the_records_do_not_show_are_not_checked_and_say_why(merges, reason):
    report = audited(merges=merges, steps=range(0, 20, 5))
    verdicts = report.of("merge_fidelity")
    assert {each.severity for each in verdicts} == {Severity.NOT_CHECKED}
    assert reason in verdicts[0].meaning
    assert failed_checks(report) == set()


def test_a_bfloat16_base_loses_a_part_of_the_update_and_warns():
    report = audited(dtype="bfloat16")
    for loss in report.of("rounding_loss"):
        assert loss.severity is Severity.WARN
        assert loss.threshold == 0.01
        assert loss.measured < 0.1
        assert "keep the base weights in float32" in loss.meaning


@pytest.mark.parametrize(("rank", "severity"), [(4, Severity.NOT_CHECKED), (8, Severity.FAIL)])
def test_kept_adapters_are_named_where_their_components_are_enough(rank, severity):
    report = audited(rank=rank, reset=False)
    verdicts = report.of("adapter_reset")
    assert len(verdicts) == 9
    assert {each.severity for each in verdicts} == {severity}
    assert all(each.measured == pytest.approx(1) for each in verdicts)
    if severity is Severity.FAIL:
        assert "24 of 24 components point in the old direction" in verdicts[0].meaning


def test_a_base_that_moves_between_merges_is_named():
    def drift(step, name, weight):
        if name == NAMES[1] and step >= 20:
            weight += np.float32(1e-3) * np.random.default_rng(1).normal(size=weight.shape).astype(
                np.float32
            )

    report = audited(weight=drift)
    assert [(each.matrix, each.step) for each in failed(report, "frozen_base")] == [(NAMES[1], 20)]


@pytest.mark.parametrize(
    ("scale", "scaling", "meaning"),
    [
        (0.5, 2.0, "forgot the scale s = 2"),
        (0.0, 2.0, "thrown away"),
        (4.0, 4.0, "s = 4 was applied twice"),
        (2.0, 4.0, "merged twice"),
        (2.0, 2.0, "s = 2 was applied twice; merge s·B·A once - or the update was merged twice"),
        (-1.0, 2.0, "subtracted"),
        (0.8, 2.0, "the base got 0.8 times the update"),
        (1.0, 1.0, "something else was added"),
    ],
)
def test_scales_have_names(scale, scaling, meaning):
    assert meaning in named_scale(scale, scaling, 1e-3)
