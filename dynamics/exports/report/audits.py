"""The verdicts of audits in the attributes of a result: written for each run, read from any."""

import json
from dataclasses import dataclass
from typing import Any

import xarray as xr

from dynamics import schema
from dynamics.auditing import audit
from dynamics.auditing.report import Report, Severity
from dynamics.errors import FormatError, MissingError
from dynamics.exports.report.runs import by_run
from dynamics.runs.run import Run


@dataclass(frozen=True)
class Check:
    """One check of a run: its worst verdict.

    Attributes:
        check: its name.
        severity: fail, warn, pass, or not checked.
        meaning: what it means and what to do, or why it was not checked.
        where: the matrix and step of the worst verdict; "" where there is none.
        numbers: what was measured and what would be allowed; "" where there are no numbers.
    """

    check: str
    severity: Severity
    meaning: str
    where: str = ""
    numbers: str = ""

    @property
    def cause(self) -> str:
        """The meaning without its remarks in brackets: what stands after the colon, if any."""
        kept, depth = [], 0
        for letter in self.meaning:
            depth += letter == "("
            if not depth:
                kept.append(letter)
            depth -= letter == ")" and depth > 0
        text = " ".join("".join(kept).split()).replace(" :", ":").replace(" ;", ";")
        return text.partition(": ")[2] or text


def checks_of_run(run: Run) -> dict[str, Any]:
    """The audit of a run as JSON-like values, for the attribute `audits` of its result.

    Of a run on the hub, only the stated hashes are compared: the rest would fetch all weights.
    A run that cannot be audited (one that holds spectra and no matrices) has one check that says
    so.
    """
    try:
        return _as_json(audit(run, hashes_only=run.source is not None))
    except (MissingError, FormatError) as reason:
        return {"audit": {"severity": Severity.NOT_CHECKED, "meaning": str(reason)}}


def _as_json(report: Report) -> dict[str, dict[str, Any]]:
    document = json.loads(report.to_json())
    return {
        each["check"]: {
            **each["worst"],
            "severity": each["severity"],
            "of": sum(each["counts"].values()),
            "alike": each["counts"][each["severity"]],
        }
        for each in document["checks"]
    }


def audits_of(comparison: xr.Dataset) -> dict[str, list[Check]]:
    """Run -> its checks; none for a run that was not audited."""
    found = by_run(comparison, schema.AUDITS)
    return {run: _checks(each) for run, each in found.items()}


def _checks(document: Any) -> list[Check]:
    if not isinstance(document, dict):
        return []
    return [_check(str(name), each) for name, each in document.items()]


def _check(name: str, found: Any) -> Check:
    if not isinstance(found, dict):  # [severity, meaning], as the example has it
        found = dict(zip(("severity", "meaning"), found, strict=False))
    severity = Severity(found.get("severity", Severity.NOT_CHECKED))
    where = [str(found["matrix"])] if found.get("matrix") else []
    where += [f"step {found['step']}"] if found.get("step") is not None else []
    if found.get("of", 1) > 1:
        where.append(f"{found['alike']} of {found['of']}")
    measured, threshold = found.get("measured"), found.get("threshold")
    numbers = "" if measured is None else f"{measured:.3g}"
    if threshold is not None and numbers:
        numbers += f" (at most {threshold:.3g})"
    return Check(name, severity, str(found.get("meaning", "")), ", ".join(where), numbers)
