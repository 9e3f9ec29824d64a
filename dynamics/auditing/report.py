"""The result of an audit: one verdict per check and matrix, and the summary of each check."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a verdict is, worst first."""

    FAIL = "fail"
    WARN = "warn"
    PASS = "pass"
    NOT_CHECKED = "not checked"


_WORST_FIRST = list(Severity)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of one check in one place.

    Attributes:
        check: the name of the check.
        severity: fail, warn, pass, or not checked.
        meaning: one sentence: what the outcome means and what to do, or why it was not checked.
        matrix: the parameter; None where the check concerns the run.
        step: the step of the record; None where the check concerns all steps.
        measured: the number that decided; None where there is no such number.
        threshold: the value that `measured` must not exceed; None where there is no such value.
    """

    check: str
    severity: Severity
    meaning: str
    matrix: str | None = None
    step: int | None = None
    measured: float | None = None
    threshold: float | None = None

    @property
    def excess(self) -> float:
        """|measured / threshold|, to order verdicts of one severity; 0 if nothing was measured.

        Where the threshold is 0 or None, it is |measured|.
        """
        if self.measured is None:
            return 0.0
        if not self.threshold:
            return abs(self.measured)
        return abs(self.measured / self.threshold)


def not_checked(
    check: str, reason: str, matrix: str | None = None, step: int | None = None
) -> Verdict:
    """The verdict of a check that this run cannot answer, with the reason."""
    return Verdict(
        check=check, severity=Severity.NOT_CHECKED, meaning=reason, matrix=matrix, step=step
    )


@dataclass(frozen=True)
class Summary:
    """One check over the whole run.

    Attributes:
        check: the name of the check.
        severity: the worst severity among its verdicts.
        worst: the verdict of that severity with the largest `excess`.
        counts: severity -> number of verdicts.
    """

    check: str
    severity: Severity
    worst: Verdict
    counts: dict[str, int]


@dataclass(frozen=True)
class Report:
    """All verdicts on a run.

    Attributes:
        run: the run's path.
        verdicts: ordered by check, then by matrix.
    """

    run: str
    verdicts: tuple[Verdict, ...]

    @property
    def severity(self) -> Severity:
        """The worst severity of all verdicts; "not checked" only if nothing was checked."""
        return _worst(each.severity for each in self.verdicts)

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return self.severity is Severity.FAIL

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """One summary per check, in the order of the checks."""
        grouped: dict[str, list[Verdict]] = {}
        for each in self.verdicts:
            grouped.setdefault(each.check, []).append(each)
        return tuple(_summary(check, verdicts) for check, verdicts in grouped.items())

    def of(self, check: str) -> tuple[Verdict, ...]:
        """The verdicts of one check; empty for an unknown name."""
        return tuple(each for each in self.verdicts if each.check == check)

    @property
    def line(self) -> str:
        """The report in one line: "pass: 11 checks passed, 2 not checked"."""
        named = {
            severity: [each.check for each in self.summaries if each.severity is severity]
            for severity in Severity
        }
        parts = [
            f"{', '.join(named[severity])} {word}"
            for severity, word in ((Severity.FAIL, "failed"), (Severity.WARN, "warned"))
            if named[severity]
        ]
        parts.append(f"{len(named[Severity.PASS])} checks passed")
        if named[Severity.NOT_CHECKED]:
            parts.append(f"{len(named[Severity.NOT_CHECKED])} not checked")
        return f"{self.severity}: {', '.join(parts)}"

    def to_json(self) -> str:
        """The whole report as JSON; NaN and Inf, which JSON does not have, become null."""
        document = {
            "run": self.run,
            "severity": self.severity,
            "checks": [
                {"check": each.check, "severity": each.severity, "counts": each.counts}
                | {"worst": _as_json(each.worst)}
                for each in self.summaries
            ],
            "verdicts": [_as_json(each) for each in self.verdicts],
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _summary(check: str, verdicts: Sequence[Verdict]) -> Summary:
    counts = {
        str(severity): sum(each.severity is severity for each in verdicts) for severity in Severity
    }
    severity = _worst(each.severity for each in verdicts)
    worst = max((each for each in verdicts if each.severity is severity), key=lambda v: v.excess)
    return Summary(check, severity, worst, counts)


def _worst(severities: Iterable[Severity]) -> Severity:
    # PASS counts as worse than NOT_CHECKED: a run passes if everything that was checked passes.
    return min(severities, key=_WORST_FIRST.index, default=Severity.NOT_CHECKED)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(verdict).items()
    }
