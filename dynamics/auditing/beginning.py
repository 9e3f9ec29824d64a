"""Whether the first record is where the run begins, and no later record is such a beginning."""

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from dynamics.auditing.history import MatrixHistory
from dynamics.auditing.order import FEWEST_NUMBERS
from dynamics.auditing.report import Severity, Verdict, not_checked
from dynamics.runs.run import Run, abridged

STEP_ZERO = "step_zero"

_NEAR, _VERY_NEAR = 1.2, 1.5
_CHANCE = 4.0  # standard deviations
_ALIKE = 0.5
_FAR_AWAY = 0.5  # of the first record's norm


def judge_step_zero(
    run: Run, histories: Sequence[MatrixHistory], wrong: Collection[int] = ()
) -> list[Verdict]:
    """A first record that is trained already, or a later one that is an initialisation.

    Training leads away from its beginning: of all records, the second is the nearest to the first.
    Where a later one is nearer, either the first record is of a later step, or the later one is of
    an earlier step. A record whose entries are independent of those of its neighbours, while these
    are alike, is of another run, or an initialisation. A step 0 whose leading singular values
    exceed those of independent entries is trained; so it is where a trained model is trained
    further, which moves it by a small part of its norm only.

    Args:
        run: the run.
        histories: of its matrices.
        wrong: steps that another check has found to be wrong, which are left out.
    """
    left_out = {*run.problems, *wrong}
    steps = [step for step in run.steps.tolist() if step not in left_out]
    whole = [
        each
        for each in histories
        if each.info.rows * each.info.cols >= FEWEST_NUMBERS
        and len(set(each.digests.values())) > 1
        and set(steps) <= set(each.from_first)
    ]
    if len(steps) < 3 or not whole or steps[0] != int(run.steps[0]):
        return [not_checked(STEP_ZERO, "it takes three records, and weights that are read")]
    strangers = _of_strangers(steps, whole)
    if strangers:
        return strangers
    away = {step: sum(each.from_first[step] for each in whole) ** 0.5 for step in steps}
    ratio, nearer = _nearer(steps, away)
    return (
        nearer
        or _of_trained(away, whole)
        or [
            _verdict(
                Severity.PASS,
                "The first record is where the run begins.",
                steps[0],
                ratio,
                _VERY_NEAR,
            )
        ]
    )


def _nearer(steps: Sequence[int], away: Mapping[int, float]) -> tuple[float, list[Verdict]]:
    """The distance of the second record from the first one / the shortest one of a later one."""
    first, second, *later = steps
    # What is equal to the first record is told by `distinct_checkpoints`.
    distances = {step: away[step] for step in later if away[step] > 0}
    ratio = away[second] / min(distances.values(), default=float("inf"))
    nearer = [step for step, each in distances.items() if away[second] > _NEAR * each]
    if not nearer:
        return ratio, []
    one = len(nearer) == 1
    shown = f"Step {nearer[0]} is" if one else f"The steps {abridged(nearer)} are"
    meaning = (
        f"{shown} up to {ratio:.1f} times nearer to step {first} than step {second} is: step "
        f"{first} may be of a later step" + f", or step {nearer[0]} of an earlier one" * one + "."
    )
    severity = Severity.FAIL if ratio > _VERY_NEAR else Severity.WARN
    return ratio, [_verdict(severity, meaning, first, ratio, _VERY_NEAR)]


def _of_strangers(steps: Sequence[int], whole: Sequence[MatrixHistory]) -> list[Verdict]:
    """Records that have nothing of their neighbours, which are alike."""
    numbers = sum(each.info.rows * each.info.cols for each in whole)
    threshold = _CHANCE / numbers**0.5
    verdicts = []
    for at, step in enumerate(steps):
        beside = [steps[i] for i in (at - 1, at + 1) if 0 <= i < len(steps)]
        cosines = [_cosine(step, each, whole) for each in beside]
        if any(each is None or abs(each) >= threshold for each in cosines):
            continue
        if len(beside) == 1:  # the first or the last record
            beside += [steps[2] if at == 0 else steps[-3]]
        one, other = beside
        alike = _cosine(one, other, whole)
        # Forgetting is exponential at most: over twice the steps, the square is left.
        intervals = max(abs(step - one) / abs(other - one), 1.0)
        if alike is not None and alike > 0 and alike**intervals > _ALIKE:
            meaning = (
                f"The weights at step {step} are independent of those at step {one}, which are "
                f"like those at step {other}: step {step} is of another run, or an initialisation."
            )
            most = max(abs(each) for each in cosines if each is not None)
            verdicts.append(_verdict(Severity.FAIL, meaning, step, most, threshold))
    return verdicts


def _cosine(one: int, other: int, whole: Sequence[MatrixHistory]) -> float | None:
    pair = min(one, other), max(one, other)
    if any(pair not in each.distances for each in whole):
        return None  # wrong records lie between them
    squares = [sum(each.squares[step] for each in whole) for step in pair]
    product = (sum(squares) - sum(each.distances[pair] for each in whole)) / 2
    norms = (squares[0] * squares[1]) ** 0.5
    return product / norms if norms else None


def _of_trained(away: Mapping[int, float], whole: Sequence[MatrixHistory]) -> list[Verdict]:
    first, last = min(away), max(away)
    beyond = [each.beyond_chance for each in whole if each.beyond_chance is not None]
    norm = sum(each.squares[first] for each in whole) ** 0.5
    if first != 0 or not beyond or not norm or away[last] < _FAR_AWAY * norm:
        return []
    measured = median(beyond)
    if measured <= 1:
        return []
    meaning = (
        f"Step 0 is trained: the largest singular value is {measured:.2f} times what independent "
        "entries give, in the median matrix. So it should be if the run continues a training; if "
        "not, this is no initialisation."
    )
    return [_verdict(Severity.WARN, meaning, 0, measured, 1.0)]


def _verdict(
    severity: Severity, meaning: str, step: int, measured: float, threshold: float
) -> Verdict:
    return Verdict(
        check=STEP_ZERO,
        severity=severity,
        meaning=meaning,
        step=step,
        measured=measured,
        threshold=threshold,
    )
