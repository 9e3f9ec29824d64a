"""Whether a run is a history: weights that return to earlier ones, or a step that lies far off."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from dynamics import schema
from dynamics.auditing.history import MatrixHistory
from dynamics.auditing.report import Severity, Verdict, not_checked
from dynamics.errors import DynamicsError
from dynamics.runs.run import Run, abridged

DISTINCT = "distinct_checkpoints"
ORDERED = "ordered_history"

# A vector of few numbers, or a matrix of a few, may return by chance in bfloat16.
FEWEST_NUMBERS = 1024
# The learning rate of the first steps may be 0: step 1 of Pythia is step 0. Steps of full batches
# at the edge of stability alternate, so that records a few steps apart need not lie in order.
FIRST_STEPS = 10
_LONG_REST = 0.01  # of the run's steps
_FAR, _VERY_FAR = 1.5, 2.0
_DENSE = 2.0  # so many times farther, where records are few steps apart
_EXCHANGED = 1.05
Contents = Mapping[str, Mapping[int, str]]  # matrix -> step -> what stands for its numbers


def contents_read(histories: Sequence[MatrixHistory]) -> Contents:
    """What stands for the numbers of each matrix, by their hashes."""
    return {
        each.info.name: each.digests
        for each in histories
        if each.info.rows * each.info.cols >= FEWEST_NUMBERS
    }


def contents_stated(run: Run) -> Contents:
    """What stands for the numbers of each matrix, by the origins, without reading any.

    Raises:
        DynamicsError: the run does not lie on the hub.
    """
    if run.source is None:
        raise DynamicsError(
            f"{run.path} does not lie on the hub, so no hashes are stated; leave hashes_only "
            "(--hashes) out."
        )
    kind = schema.WEIGHT if schema.WEIGHT in run.stored_kinds else schema.ADAPTER
    contents: dict[str, dict[int, str]] = {}
    for name, info in run.matrices.items():
        if info.rows * info.cols >= FEWEST_NUMBERS:
            origins = {step: run.origin(name, step, kind) for step in run.steps.tolist()}
            contents[name] = {step: each for step, each in origins.items() if each is not None}
    return contents


def judge_distinct(steps: Sequence[int], contents: Contents) -> list[Verdict]:
    """Weights that are the same, bit by bit, at several steps.

    Training never returns exactly to weights that it left. So two equal records with another one
    between them are no training. A matrix that never changes is frozen, and says nothing.
    """
    changing = {name: each for name, each in contents.items() if len(set(each.values())) > 1}
    if not changing:
        return [not_checked(DISTINCT, "no large matrix changes, or there is one record only")]
    returns: dict[tuple[int, ...], list[str]] = {}
    rests: dict[tuple[int, int], int] = {}
    for name, of_steps in changing.items():
        for group in _groups(of_steps):
            if _returns(group, of_steps):
                returns.setdefault(group, []).append(name)
        for before, now in pairwise(sorted(of_steps)):
            if of_steps[before] == of_steps[now]:
                rests[before, now] = rests.get((before, now), 0) + 1
    verdicts = [_of_return(group, names, len(changing)) for group, names in returns.items()]
    span = max(steps[-1] - steps[0], 1)
    for (before, now), count in rests.items():
        returning = any({before, now} <= set(group) for group in returns)
        if count == len(changing) and not returning:
            verdicts.append(_of_rest(before, now, (now - before) / span))
    return verdicts or [
        Verdict(
            check=DISTINCT,
            severity=Severity.PASS,
            meaning=f"No two of {len(steps)} records hold the same weights.",
            measured=0.0,
            threshold=0.0,
        )
    ]


def _groups(of_steps: Mapping[int, str]) -> list[tuple[int, ...]]:
    """The steps with equal content, where there are several."""
    groups: dict[str, list[int]] = {}
    for step, content in sorted(of_steps.items()):
        groups.setdefault(content, []).append(step)
    return [tuple(each) for each in groups.values() if len(each) > 1]


def _returns(group: tuple[int, ...], of_steps: Mapping[int, str]) -> bool:
    inside = [step for step in of_steps if group[0] <= step <= group[-1]]
    return len(inside) > len(group)


def _of_return(group: tuple[int, ...], names: list[str], of: int) -> Verdict:
    shown = names[0] if len(names) == 1 else f"{len(names)} of {of} matrices"
    return Verdict(
        check=DISTINCT,
        severity=Severity.FAIL,
        meaning=(
            f"The steps {abridged(group)} hold the same numbers in {shown}, and others lie "
            "between them. Training does not return exactly: all of these but one are not what "
            "they are called."
        ),
        matrix=names[0] if len(names) == 1 else None,
        step=group[0],
        measured=float(len(group)),
        threshold=1.0,
    )


def _of_rest(before: int, now: int, share: float) -> Verdict:
    harmless = now <= FIRST_STEPS or now - before <= FIRST_STEPS
    severity = Severity.WARN if share <= _LONG_REST else Severity.FAIL
    why = (
        "the learning rate was 0 there, as it often is at first"
        if harmless
        else "one of the two may be a copy of the other"
    )
    return Verdict(
        check=DISTINCT,
        severity=Severity.PASS if harmless else severity,
        meaning=f"The steps {before} and {now} hold the same weights: {why}.",
        step=now,
        measured=share,
        threshold=_LONG_REST,
    )


def judge_order(run: Run, histories: Iterable[MatrixHistory]) -> list[Verdict]:
    """A step that lies far from both its neighbours, or two neighbours that are exchanged.

    With U_j = W_{j+1} − W_j, pooled over the matrices, a step lies far off by the smaller of two
    ratios: that of min(‖U_{j−1}‖, ‖U_j‖) to ‖W_{j+1} − W_{j−1}‖, and to the updates around, scaled
    by the steps that they take. A foreign checkpoint has both large; training at the edge of
    stability has only the first. Two neighbours are exchanged where the path through four records
    is longer than with the middle two the other way round.
    """
    squares: dict[tuple[int, int], float] = {}
    for history in histories:
        for pair, square in history.distances.items():
            squares[pair] = squares.get(pair, 0.0) + square
    steps = [step for step in run.steps.tolist() if step not in run.problems]
    found = {
        steps[j]: far
        for j in range(1, len(steps) - 1)
        if (far := _how_far(j, steps, squares)) is not None
    }
    if not found:
        return [not_checked(ORDERED, "it takes five records, and weights that are read")]
    scale = {step: _DENSE if _is_dense(step, steps) else 1.0 for step in found}
    wrong = {step for step, far in found.items() if far > _VERY_FAR * scale[step]}
    verdicts, exchanged = _exchanges(steps, squares, wrong)
    for step, far in found.items():
        if far > _FAR * scale[step] and step not in exchanged:
            meaning = (
                f"The weights at step {step} are {far:.1f} times as far from both neighbours as "
                "these from each other, or as updates around it: they may be of another step, or "
                "of another run."
            )
            severity = Severity.FAIL if step in wrong else Severity.WARN
            verdicts.append(_of_order(severity, meaning, step, far, _VERY_FAR * scale[step]))
    worst = max(found, key=lambda step: found[step] / scale[step])
    fine = "Each record lies between its neighbours."
    verdicts.sort(key=lambda each: each.step or 0)
    return verdicts or [
        _of_order(Severity.PASS, fine, worst, found[worst], _VERY_FAR * scale[worst])
    ]


def _of_order(
    severity: Severity, meaning: str, step: int, measured: float, threshold: float = _VERY_FAR
) -> Verdict:
    return Verdict(
        check=ORDERED,
        severity=severity,
        meaning=meaning,
        step=step,
        measured=measured,
        threshold=threshold,
    )


def _is_dense(step: int, steps: Sequence[int]) -> bool:
    """Whether the records around are so few steps apart that they need not lie in order."""
    at = steps.index(step)
    return steps[at + 1] - step < FIRST_STEPS or step - steps[at - 1] < FIRST_STEPS


def _exchanges(
    steps: Sequence[int], squares: Mapping[tuple[int, int], float], wrong: set[int]
) -> tuple[list[Verdict], set[int]]:
    """Each two neighbours that are exchanged, and the steps around them."""
    found = {
        j: detour
        for j in range(1, len(steps) - 2)
        if not wrong & set(steps[j - 1 : j + 3]) and (detour := _detour(j, steps, squares))
    }
    verdicts, around = [], set[int]()
    for j, detour in found.items():
        clearest = max(found.get(i, 0.0) for i in range(j - 2, j + 3))
        if detour > _EXCHANGED and detour == clearest:
            around |= set(steps[j - 1 : j + 3])
            meaning = (
                f"The way through the steps {abridged(steps[j - 1 : j + 3])} is {detour:.2f} times "
                f"as long as with {steps[j]} and {steps[j + 1]} exchanged: they may be mixed up."
            )
            verdict = _of_order(Severity.FAIL, meaning, steps[j], detour, _EXCHANGED)
            verdicts.append(verdict)
    return verdicts, around


def _detour(j: int, steps: Sequence[int], squares: Mapping[tuple[int, int], float]) -> float | None:
    """The path through four records over that with the middle two, j and j + 1, exchanged."""
    a, b, c, d = steps[j - 1 : j + 3]
    pairs = ((a, b), (b, c), (c, d), (a, c), (b, d))
    if min(b - a, c - b, d - c) < FIRST_STEPS or not all(pair in squares for pair in pairs):
        return None
    first, middle, last, over, under = (squares[pair] ** 0.5 for pair in pairs)
    other = over + middle + under
    return (first + middle + last) / other if other else None


def _how_far(
    j: int, steps: Sequence[int], squares: Mapping[tuple[int, int], float]
) -> float | None:
    def length(a: int, b: int) -> float | None:
        if not 0 <= a < b < len(steps):
            return None
        square = squares.get((steps[a], steps[b]))
        return None if square is None else square**0.5

    left, right, across = length(j - 1, j), length(j, j + 1), length(j - 1, j + 1)
    if left is None or right is None or across is None:
        return None
    around = []
    longest = max(steps[j] - steps[j - 1], steps[j + 1] - steps[j])
    for a, b in ((j - 2, j - 1), (j + 1, j + 2)):
        update = length(a, b)
        if update is not None:
            around.append(update * max(1.0, longest / (steps[b] - steps[a])))
    nearer = min(left, right)
    if not around or nearer == 0 or len(steps) < 5:
        return None
    usual = max(around)
    return min(nearer / across if across else np.inf, nearer / usual if usual else np.inf)
