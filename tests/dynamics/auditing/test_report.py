"""Severities, summaries and JSON of reports."""

import json

from dynamics.auditing import Report, Severity, Verdict
from dynamics.auditing.report import not_checked


def verdict(severity, measured, threshold=1.0):
    return Verdict(
        check="finite", severity=severity, meaning="m", measured=measured, threshold=threshold
    )


def test_a_report_passes_if_everything_that_was_checked_passes():
    report = Report("run", (verdict(Severity.PASS, 0.5), not_checked("moments", "no events")))
    assert (report.severity, report.failed) == (Severity.PASS, False)
    assert report.line == "pass: 1 checks passed, 1 not checked"
    assert Report("run", ()).severity is Severity.NOT_CHECKED


def test_the_worst_verdict_is_the_one_furthest_above_its_threshold():
    verdicts = tuple(
        verdict(Severity.FAIL, *numbers) for numbers in ((2.0, 1.0), (9.0, 3.0), (8.0, 1.0))
    )
    report = Report("run", (*verdicts, verdict(Severity.WARN, 99.0)))
    assert report.failed
    (summary,) = report.summaries
    assert summary.worst is verdicts[2]
    assert summary.counts == {"fail": 3, "warn": 1, "pass": 0, "not checked": 0}
    assert report.line == "fail: finite failed, 0 checks passed"


def test_the_excess_is_relative_to_the_threshold_where_there_is_one():
    assert verdict(Severity.FAIL, -3.0, 2.0).excess == 1.5
    assert verdict(Severity.FAIL, -3.0, 0.0).excess == verdict(Severity.FAIL, 3.0, None).excess == 3
    assert verdict(Severity.NOT_CHECKED, None).excess == 0


def test_numbers_that_json_does_not_have_are_null():
    report = Report("run", (verdict(Severity.FAIL, 2.0), verdict(Severity.FAIL, float("inf"))))
    document = json.loads(report.to_json())
    assert [each["measured"] for each in document["verdicts"]] == [2.0, None]
    assert document["checks"][0]["worst"]["measured"] is None
