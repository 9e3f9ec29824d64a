"""The parts of a report that are text: verdicts, what was left out, where the numbers are from."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.auditing.report import Severity
from dynamics.exports.report.audits import Check, audits_of
from dynamics.exports.report.facts import cell_counts
from dynamics.exports.report.runs import by_run, groups_of
from dynamics.exports.report.tables import Cell, folded, pairs, paragraph, table
from dynamics.metrics import METRICS
from dynamics.metrics.modules import metric_names
from dynamics.runs.account import Account
from dynamics.runs.run import abridged

_MOST_NAMES = 200  # of a list that is folded


def verdicts(comparison: xr.Dataset) -> str:
    """What the audits say: what failed and warned, then what passed, then what was not checked."""
    audits = audits_of(comparison)
    done = {run: checks for run, checks in audits.items() if checks}
    if not done:
        return paragraph(
            "This result holds no verdicts. 'dynamics report RUN' checks the run itself, and "
            "'dynamics audit RUN' prints the verdicts."
        )
    several = len(audits) > 1
    parts = []
    without = [run for run in audits if run not in done]
    if without:
        parts.append(paragraph(f"Not audited: {abridged(without, 12)}."))
    bad = _rows(comparison, done, (Severity.FAIL, Severity.WARN))
    passed = _rows(comparison, done, (Severity.PASS,))
    if bad:
        parts.append(_verdict_table("Checks that failed or warned", bad, several))
    elif passed:
        parts.append(paragraph("No check failed, and none warned."))
    if passed:
        number = sum(each.severity is Severity.PASS for checks in done.values() for each in checks)
        content = _verdict_table("Checks that passed", passed, several)
        parts.append(folded(f"{number:,} checks passed", content))
    parts.append(_not_checked(done))
    return "".join(parts)


def _rows(
    comparison: xr.Dataset, done: Mapping[str, Sequence[Check]], severities: Sequence[Severity]
) -> dict[Check, str]:
    """Check -> the runs in which it came out so, the worst first."""
    runs: dict[Check, list[str]] = {}
    for severity in severities:
        for run, checks in done.items():
            for each in checks:
                if each.severity is severity:
                    runs.setdefault(each, []).append(run)
    return {check: _together(comparison, each) for check, each in runs.items()}


def _together(comparison: xr.Dataset, runs: Sequence[str]) -> str:
    """Names of runs; a whole group is called by its name."""
    names = [str(each) for each in comparison[schema.RUN].values]
    left, found = list(runs), []
    for group in groups_of(comparison):
        members = [names[i] for i in group.runs]
        if len(members) > 1 and set(members) <= set(left):
            found.append(f"{group.name} ({len(members)} runs)")
            left = [each for each in left if each not in members]
    return ", ".join([*found, *left])


def _verdict_table(caption: str, rows: Mapping[Check, str], several: bool) -> str:
    """A row for each verdict; without the columns that would be empty."""
    columns: dict[str, list[Cell]] = {
        "runs": list(rows.values()) if several else [],
        "verdict": [(str(c.severity), f"verdict {c.severity.name.lower()}") for c in rows],
        "check": [each.check for each in rows],
        "where": [each.where for each in rows],
        "measured": [each.numbers for each in rows],
        "meaning": [each.meaning for each in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return table(caption, list(shown), list(zip(*shown.values(), strict=True)), wide=True)


def _not_checked(done: dict[str, list[Check]]) -> str:
    """One line for all that was not checked, with the reasons folded."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for run, checks in done.items():
        for each in checks:
            if each.severity is Severity.NOT_CHECKED:
                reasons.setdefault((each.check, each.meaning), []).append(run)
    if not reasons:
        return ""
    names = list(dict.fromkeys(check for check, _ in reasons))
    listed = [
        (check, f"{why}{f' ({len(runs)} of {len(done)} runs)' if len(done) > 1 else ''}")
        for (check, why), runs in reasons.items()
    ]
    return folded(f"Not checked: {', '.join(names)}", pairs(listed))


def left_out(comparison: xr.Dataset, omitted: Sequence[str]) -> str:
    """What is not in the result, or not in this report, and why."""
    parts = [_counted(comparison), *_accounts(comparison), *_passed_over(comparison)]
    problems = [
        (run, text) for run, each in by_run(comparison, "problems").items() for text in each or ()
    ]
    if problems:
        rows = [list(each) for each in problems[:_MOST_NAMES]]
        shown = "" if len(problems) <= _MOST_NAMES else f"; the first {_MOST_NAMES}"
        content = table("What could not be measured", ["run", "problem"], rows, wide=True)
        parts.append(folded(f"{len(problems):,} problems while measuring{shown}", content))
    if omitted:
        listed = "".join(paragraph(each) for each in omitted)
        parts.append(f"<h3>In the result, and not in this file</h3>{listed}")
    return "".join(parts)


def _counted(comparison: xr.Dataset) -> str:
    if schema.STATUS not in comparison:
        return ""
    meanings = {
        "measured": "a number",
        "not recorded": "the run has the kind, but not this matrix at this step",
        "undefined": "there is nothing to measure, such as an update before the first record",
        "non finite": "the matrix holds NaN or Inf",
        "unreadable": "a file is damaged or missing",
        "does not apply": "a run has nothing of this kind, such as adapters in full-rank training",
    }
    counts = cell_counts(comparison)
    rows = [[name, f"{counts[name]:,}", why] for name, why in meanings.items() if counts[name]]
    return table("Cells (run × kind × step × matrix)", ["outcome", "cells", "meaning"], rows)


def _accounts(comparison: xr.Dataset) -> Iterator[str]:
    """What of each model is measured; runs that say the same are told of once."""
    lines: dict[str, list[str]] = {}
    accounts: dict[str, Account] = {}
    for run, found in by_run(comparison, "account").items():
        account = Account.from_json(found)
        line = (
            account.line(names=3) if account else "The result does not tell what else the model has"
        )
        lines.setdefault(line, []).append(run)
        if account:
            accounts[line] = account
    for line, runs in lines.items():
        who = f"{abridged(runs, 4)}: " if len(lines) > 1 else ""
        yield paragraph(f"{who}Of the model, {line}." if line in accounts else f"{who}{line}.")
        if line not in accounts:
            yield from _reasons(by_run(comparison, "left_out"), runs)
            continue
        if warning := accounts[line].warning():
            yield paragraph(warning, "warning")
        rows = [
            [each.name, " × ".join(map(str, each.shape)), each.reason, "yes" if each.trains else ""]
            for each in accounts[line].left_out[:_MOST_NAMES]
        ]
        if rows:
            columns = ["tensor", "shape", "reason", "trains"]
            content = table("Tensors that were left out", columns, rows)
            yield folded(f"{len(accounts[line].left_out):,} tensors were left out", content)


def _reasons(left_out: Mapping[str, Any], runs: Sequence[str]) -> Iterator[str]:
    """What a result names that has no account: names and reasons."""
    rows = {
        (str(name), str(why)): None
        for run in runs
        for name, why in (left_out.get(run) or {}).items()
    }
    if rows:
        content = table(
            "Tensors that were left out", ["tensor", "reason"], list(rows)[:_MOST_NAMES]
        )
        yield folded(f"{len(rows):,} tensors were left out", content)


def _passed_over(comparison: xr.Dataset) -> Iterator[str]:
    rows = [
        [run, str(name), str(why)]
        for run, each in by_run(comparison, "passed_over").items()
        for name, why in (each or {}).items()
    ]
    if rows:
        content = table("Beside the runs", ["run", "file", "why it is no part of the run"], rows)
        yield folded(f"{len(rows):,} files beside the runs were passed over", content)


def provenance(comparison: xr.Dataset, command: str | None) -> str:
    """Commands, versions, sources, hashes, and what the words mean."""
    attrs = comparison.attrs
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = _json(attrs.get("versions"))
    rows = [
        ("This report", f"made {made} by learning-dynamics {version('learning-dynamics')}"),
        ("Its command", command or "none; it was made in Python"),
        ("The result's command", str(attrs.get(schema.COMMAND, "none; it was made in Python"))),
        ("The result was made", str(attrs.get(schema.MADE, "not noted"))),
        ("Measured with", ", ".join(f"{n} {v}" for n, v in versions.items()) or "not noted"),
        ("Measured on", str(attrs.get("measured_by", "not noted"))),
    ]
    if schema.LAG in attrs:
        rows.append(("Updates are over", f"{attrs[schema.LAG]} optimizer steps"))
    sources = by_run(comparison, schema.SOURCES)
    columns = ["run", "source", "format", "command", "SHA-256 of its numbers"]
    listed = []
    for position, run in enumerate(by_run(comparison, "")):
        source = sources[run] or {
            "source": attrs.get("source"),
            "source_format": attrs.get("source_format"),
        }
        listed.append(
            [
                run,
                str(source.get("source") or "not noted"),
                str(source.get("source_format") or ""),
                str(source.get(schema.COMMAND) or ""),
                fingerprint(comparison.isel({schema.RUN: position})),
            ]
        )
    return (
        pairs(rows)
        + table("Sources of the runs", columns, listed)
        + paragraph(
            "The same hash means the same measurements: it is of the spectra, or of the metrics "
            "where the result has no spectra, and not of where the files lie.",
            "note",
        )
        + _settings(comparison)
        + _definitions(comparison)
    )


def fingerprint(run: xr.Dataset) -> str:
    """The first 16 digits of a SHA-256 of one run's numbers, of what and when they are."""
    found = hashlib.sha256()
    for name in (schema.KIND, schema.STEP, schema.MATRIX):
        found.update(json.dumps(run[name].values.tolist()).encode())
    names = [schema.SINGULAR_VALUE] if schema.SINGULAR_VALUE in run else metric_names(run)
    for name in names:
        dims = (schema.KIND, schema.STEP, schema.MATRIX, schema.INDEX)
        values = run[name].transpose(*(d for d in dims if d in run[name].dims)).values
        for of_step in (each for of_kind in values for each in of_kind):  # memory
            found.update(np.ascontiguousarray(of_step, dtype=np.float64).tobytes())
    return found.hexdigest()[:16]


def _settings(comparison: xr.Dataset) -> str:
    """The settings in which the runs differ."""
    columns = {
        str(name): [str(each) for each in coord.values.tolist()]
        for name, coord in comparison.coords.items()
        if coord.dims == (schema.RUN,) and name != schema.RUN
    }
    if not columns:
        return ""
    runs = [str(each) for each in comparison[schema.RUN].values]
    groups = {i: each.name for each in groups_of(comparison) for i in each.runs}
    rows = [[run, groups[i], *(each[i] for each in columns.values())] for i, run in enumerate(runs)]
    content = table("Settings in which the runs differ", ["run", "group", *columns], rows)
    return folded("Settings in which the runs differ", content)


def _definitions(comparison: xr.Dataset) -> str:
    kinds = [
        [str(kind), schema.KINDS.get(str(kind), "")] for kind in comparison[schema.KIND].values
    ]
    metrics = []
    for name in metric_names(comparison):
        attrs = comparison[name].attrs
        known = METRICS.get(name)
        metrics.append(
            [
                name,
                str(attrs.get("long_name", known.long_name if known else "")),
                str(attrs.get("units", "")),
                str(attrs.get("reference", known.reference if known else "")),
            ]
        )
    gradient = _json(comparison.attrs.get("source_attrs")).get("gradient")
    text = paragraph(f"Gradient, as recorded: {gradient}", "note") if gradient else ""
    return (
        folded("What the kinds are", table("Kinds", ["kind", "meaning"], kinds, wide=True))
        + folded(
            "What the metrics are",
            table("Metrics", ["metric", "meaning", "units", "reference"], metrics, wide=True),
        )
        + text
    )


def _json(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
