"""Whether records of a run are those of another run."""

from collections.abc import Mapping
from contextlib import suppress

from dynamics import schema
from dynamics.auditing.history import digest
from dynamics.auditing.order import FEWEST_NUMBERS, FIRST_STEPS, Contents
from dynamics.auditing.report import Severity, Verdict, not_checked
from dynamics.errors import FormatError
from dynamics.runs.run import Dense, Run, abridged

DISTINCT_RUNS = "distinct_runs"


def contents_of(run: Run) -> Contents:
    """What stands for the numbers of each matrix, which are read for it."""
    contents: dict[str, dict[int, str]] = {}
    for name, info in run.matrices.items():
        if info.rows * info.cols < FEWEST_NUMBERS or schema.WEIGHT not in run.stored_kinds:
            continue
        contents[name] = {}
        for step in (each for each in run.steps.tolist() if each not in run.problems):
            with suppress(FormatError):  # an audit of that run tells
                weight = run.read(name, step, schema.WEIGHT)
                if isinstance(weight, Dense):
                    contents[name][step] = digest(weight.values)
    return contents


def judge_distinct_runs(contents: Contents, other: str, of_other: Contents) -> list[Verdict]:
    """Records that hold the numbers of records of another run, where the two are apart.

    Two runs may begin alike: with one initialisation, or with a part that they share. One may begin
    with any record of the other, which it continues. Training does not lead to equal numbers after
    that.

    Args:
        contents: of the run.
        other: the path of the other run.
        of_other: of the other run.
    """
    changing = [
        name
        for name, each in contents.items()
        if len(set(each.values())) > 1 and set(of_other.get(name, ()))
    ]
    if not changing:
        return [not_checked(DISTINCT_RUNS, f"no large matrix that changes is in {other}, too")]
    equal: dict[tuple[int, int], int] = {}
    for name in changing:
        for pair in _equal(contents[name], of_other[name]):
            equal[pair] = equal.get(pair, 0) + 1
    steps = sorted({step for name in changing for step in contents[name]})
    others = sorted({step for name in changing for step in of_other[name]})
    shared = _shared(steps, others, equal)
    if len(shared) > 1 and shared[-1] == min(steps[-1], others[-1]):
        meaning = f"All records of both are equal: this run, or {other}, is a copy of the other."
        return [_verdict(Severity.FAIL, meaning, shared[-1], len(shared))]
    verdicts = []
    for (step, of), count in sorted(equal.items()):
        begins = step == steps[0] or of == others[0] or max(step, of) <= FIRST_STEPS
        if begins or (step == of and step in shared):
            continue
        meaning = (
            f"Step {step} holds the numbers of step {of} of {other} in {count} of {len(changing)} "
            "matrices, where the two runs are apart: one of the two is not what it is called."
        )
        verdicts.append(_verdict(Severity.FAIL, meaning, step, count))
    fine = f"No record holds the weights of {other}"
    if shared:
        fine += f", but for the beginning that both share: {abridged(shared)}"
    return verdicts or [_verdict(Severity.PASS, f"{fine}.", None, 0)]


def _equal(of_steps: Mapping[int, str], of_others: Mapping[int, str]) -> list[tuple[int, int]]:
    found: dict[str, list[int]] = {}
    for step, content in of_others.items():
        found.setdefault(content, []).append(step)
    return [(step, of) for step, content in of_steps.items() for of in found.get(content, ())]


def _shared(steps: list[int], others: list[int], equal: Mapping[tuple[int, int], int]) -> list[int]:
    """The common steps at which the runs have not parted yet."""
    shared = []
    for step in sorted(set(steps) & set(others)):
        if (step, step) not in equal:
            break
        shared.append(step)
    return shared


def _verdict(severity: Severity, meaning: str, step: int | None, measured: int) -> Verdict:
    return Verdict(
        check=DISTINCT_RUNS,
        severity=severity,
        meaning=meaning,
        step=step,
        measured=float(measured),
        threshold=0.0,
    )
